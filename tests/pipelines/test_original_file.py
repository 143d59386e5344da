"""Stable Diffusion in one file: the picture, the plan and the errors, beside the same weights in a folder."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.fitting.fits import bare_machine, make, traced_once  # noqa: F401
from tests.guests.single_file_cases import reading_no_weights
from tests.loading.original_files import (
    KINDS,
    original_state,
    pipeline,
    published_shapes,
    save,
    write,
    write_sparse,
)

import lowtide
from lowtide.casting.block_weight import BlockWeight
from lowtide.casting.cast_weight import small_of
from lowtide.hub import Source
from lowtide.loading.components import LoadOptions
from lowtide.loading.original_file import FileOptions
from lowtide.memory.attach import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.load import open_checkpoint
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.planning.plan import BudgetError
from lowtide.sizes import parse_bytes
from lowtide.weights.index import CheckpointError, UnsafeWeightsError
from lowtide.weights.provenance import noted_origin
from lowtide.weights.slots import slots

NETWORKS = ("unet", "vae", "text_encoder")
VAE = "first_stage_model."


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return write("sd1", tmp_path_factory.mktemp("first"))


def from_file(written, file=None, **options):
    pipe = StableDiffusionPipeline.from_single_file(file or written.file, config=written.folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_folder(written, **options):
    pipe = StableDiffusionPipeline.from_pretrained(written.folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def changed_file(written, folder, change):
    """A copy of the file whose weights a function has changed."""
    state = load_file(written.file)
    change(state)
    return save(state, folder / "changed.safetensors")


# ---- the same as from a folder


def test_the_picture_is_that_of_the_folder_and_weights_lie_in_the_file(written):
    pipe = from_file(written)
    assert torch.equal(make(pipe), make(from_folder(written)))
    for name in NETWORKS:
        for slot in slots(getattr(pipe, name)):
            if slot.kind == "parameter":
                assert noted_origin(slot.tensor).file.path == written.file, slot.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", ["auto", torch.float32], ids=str)
def test_files_in_half_precision(dtype, asked, tmp_path):
    written = write("sd2", tmp_path, dtype)
    pipe, other = from_file(written, torch_dtype=asked), from_folder(written, torch_dtype=asked)
    assert pipe.unet.dtype == (dtype if asked == "auto" else asked)
    for name in NETWORKS:
        own, theirs = getattr(pipe, name).state_dict(), getattr(other, name).state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) and own[key].dtype == theirs[key].dtype for key in own)
    assert torch.equal(make(pipe, num_inference_steps=1), make(other, num_inference_steps=1))


@pytest.mark.parametrize("options", [{"offload": "sequential"}, {"offload": "block"}, {"casting": "int8"}], ids=str)
def test_rules_stream_from_the_file(written, options):
    pipe = from_file(written, **options)
    assert torch.equal(make(pipe), make(from_folder(written, **options)))
    if "offload" in options:
        assert all(isinstance(weight.rest, DiskRest) and weight.rest.origin.file.path == written.file
            for name in NETWORKS for weight in attachment_of(getattr(pipe, name)).weights
            if weight.views[0].slot.kind == "parameter")  # fmt: skip


@pytest.mark.usefixtures("bare_machine", "traced_once")
def test_a_budget_is_planned_without_reading_a_weight_and_kept(written):
    size = {"height": 32, "width": 32, "steps": 3, "pictures": 2, "prompts": 1, "output": "pt"}
    with reading_no_weights(), pytest.raises(BudgetError) as refusal:
        from_file(written, ram=1, size=size, offload_device="cpu")
    least = refusal.value.minimum.ram
    expected = make(from_folder(written))
    for ram in (least, 2 * least, "16GB"):
        pipe = from_file(written, ram=ram, size=size, offload_device="cpu")
        plan = pipe.plan
        made = make(pipe)
        assert pipe.plan is plan  # the call is the one that was planned for
        by_rows = any(stage.way != "whole" for stage in plan.stages)
        assert torch.allclose(made, expected, rtol=0, atol=1e-5) if by_rows else torch.equal(made, expected)
        assert plan.peak <= parse_bytes(ram)
        for name in NETWORKS:
            attachment = attachment_of(getattr(pipe, name))
            if attachment is not None:
                assert attachment.stream.ledger.peak <= attachment.bound <= plan.peak
        pipe.unfit()
        assert torch.equal(make(pipe), expected)


def test_what_is_planned_of_each_weight_is_how_it_is_loaded(written):
    """Where it lies in the file decides whether it is used there or copied, and so what it takes."""
    source, options = Source(str(written.file)), LoadOptions(torch.float32)
    checkpoint = open_checkpoint(source, options, file_options=FileOptions(config=str(written.folder)))
    with reading_no_weights():
        meta = checkpoint.on_meta(torch.device("cpu"))
    pipe = checkpoint.load()
    for name in NETWORKS:
        planned = meta.in_files[name]
        for slot in slots(getattr(pipe, name)):
            if slot.kind == "parameter":
                assert planned[slot.name] == noted_origin(slot.tensor).lying, slot.name
                is_view = slot.tensor.data_ptr() % 4096 == noted_origin(slot.tensor).offset % 4096
                assert is_view or not planned[slot.name].in_place, slot.name


def test_it_is_saved_to_a_folder_and_loaded_again(written, tmp_path):
    pipe = from_file(written, offload="block")
    pipe.save_pretrained(tmp_path / "saved")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(make(saved), make(pipe))
    assert saved.safety_checker is None


def test_every_door_takes_a_file(written):
    expected = make(from_folder(written))
    for load in (
        lambda: DiffusionPipeline.from_single_file(str(written.file), config=str(written.folder)),
        lambda: DiffusionPipeline.from_pretrained(
            written.file, file_options=FileOptions(config=str(written.folder))
        ),
        lambda: lowtide.load(written.file, ram="16GB", config=written.folder, dtype="float32", device="cpu"),
    ):  # fmt: skip
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is StableDiffusionPipeline
        assert torch.equal(make(pipe), expected)


def test_older_names_of_the_text_encoder(first, tmp_path):
    older = "cond_stage_model.transformer."
    state = {name.replace(older + "text_model.", older): x for name, x in load_file(first.file).items()}
    pipe = from_file(first, save(state, tmp_path / "older.safetensors"))
    assert torch.equal(make(pipe), make(from_folder(first)))


def write_gguf(state, file, kind):
    """A GGUF file as stable-diffusion.cpp writes them: original names, matrices in blocks where they can be."""
    gguf = pytest.importorskip("gguf")
    kind, packed = gguf.GGMLQuantizationType[kind], 0
    writer = gguf.GGUFWriter(file, "sd")
    for name, x in state.items():
        numbers = x.float().half().numpy() if x.ndim else x.float().reshape(1).numpy()
        is_norm = name.startswith(VAE) and x.ndim == 1  # which it packs too
        in_blocks = kind.name != "F16" and (x.ndim == 2 or is_norm) and x.shape[-1] % 32 == 0
        numbers = gguf.quants.quantize(numbers.astype("float32"), kind) if in_blocks else numbers
        writer.add_tensor(name, numbers, raw_dtype=kind if in_blocks else None)
        packed += in_blocks
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return packed


def test_gguf_of_plain_numbers(first, tmp_path):
    write_gguf(load_file(first.file), tmp_path / "F16.gguf", "F16")
    pipe = from_file(first, tmp_path / "F16.gguf")
    expected = {name: x.half().float() for name, x in from_folder(first).unet.state_dict().items()}
    assert all(torch.equal(x, expected[name]) for name, x in pipe.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf_in_blocks(written, tmp_path, kind):
    """They rest in the file, and results are those of their numbers, under a budget too."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / f"{kind}.gguf"
    assert write_gguf(load_file(written.file), file, kind) > 10
    pipe = from_file(written, file)
    in_blocks = {
        name: small
        for network in NETWORKS
        for name, x in getattr(pipe, network).named_parameters()
        if isinstance(small := small_of(x), BlockWeight)
    }
    assert len(in_blocks) > 10
    assert all(isinstance(small.rest, DiskRest) for small in in_blocks.values())
    plain = from_folder(written)
    for network in NETWORKS:
        for name, x in getattr(plain, network).state_dict().items():
            now = getattr(pipe, network).state_dict()[name]
            expected = x.half().float()
            if name in in_blocks:
                quantization = gguf.GGMLQuantizationType[kind]
                rows = expected.reshape(len(x), -1) if x.ndim > 1 else expected[None]
                rounded = gguf.quants.quantize(rows.numpy(), quantization)
                expected = torch.from_numpy(gguf.quants.dequantize(rounded, quantization)).view(x.shape)
            assert torch.equal(now, expected), name
        getattr(plain, network).load_state_dict(getattr(pipe, network).state_dict())
    expected = make(pipe)
    assert torch.equal(make(plain), expected)
    planned = lowtide.load(file, config=written.folder, ram="8GB", height=32, width=32, num_inference_steps=2)
    planned.set_progress_bar_config(disable=True)
    assert torch.equal(make(planned), expected)
    assert any(isinstance(small_of(x), BlockWeight) for x in planned.unet.parameters())


def test_gguf_of_other_blocks_is_refused(first, tmp_path):
    write_gguf(load_file(first.file), tmp_path / "Q5_0.gguf", "Q5_0")
    with pytest.raises(CheckpointError, match=r"is Q5_0, in which models of Lowtide's own cannot rest"):
        from_file(first, tmp_path / "Q5_0.gguf")


@pytest.mark.parity
def test_diffusers_reads_the_same_from_the_file(written):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(str(written.file), config=str(written.folder))
    ours = from_file(written)
    for name in NETWORKS:
        state = {key.removeprefix("text_model."): x for key, x in getattr(theirs, name).state_dict().items()}
        own = getattr(ours, name).state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(own[key], x) for key, x in state.items())


# ---- what a file does not say


@pytest.mark.parametrize(
    ("kind", "prediction", "scheduler", "predicts", "side", "padding"),
    [
        ("sd1", None, "PNDMScheduler", "epsilon", 64, "<|endoftext|>"),
        ("sd1", "v_prediction", "PNDMScheduler", "v_prediction", 64, "<|endoftext|>"),
        ("sd2", None, "DDIMScheduler", "v_prediction", 96, "!"),
        ("sd2", "epsilon", "PNDMScheduler", "epsilon", 64, "!"),
    ],
)
def test_published_sizes_need_no_configurations(tmp_path, kind, prediction, scheduler, predicts, side, padding):
    """Of a file with a header and no numbers, of which nothing is read, and nothing is fetched."""
    file = write_sparse(published_shapes(kind), tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipe = StableDiffusionPipeline.from_single_file(
            file, prediction_type=prediction, torch_dtype="auto", offload="sequential", offload_device="cpu"
        )
    config = pipe.scheduler.config
    assert (type(pipe.scheduler).__name__, config.prediction_type) == (scheduler, predicts)
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.steps_offset, config.set_alpha_to_one) == (1, False)
    assert pipe.unet.config.sample_size == side
    assert pipe.unet.dtype == torch.float16
    words = pipe.tokenizer("a photo of a cat", padding="max_length", max_length=77).input_ids
    assert words[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert words[7:] == [pipe.tokenizer.pad_token_id] * 70
    assert pipe.tokenizer.pad_token == padding
    assert pipe.tokenizer.pad_token_id == (0 if padding == "!" else 49407)


def test_the_words_are_those_of_transformers(tmp_path):
    """And a tokenizer that is saved and loaded reads as before."""
    transformers = pytest.importorskip("transformers")
    assets = lowtide.__path__[0] + "/assets/"
    file = write_sparse(published_shapes("sd2"), tmp_path / "model.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(file, offload="sequential", offload_device="cpu")
    pipe.tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copytree(assets + "clip_vocabulary", tmp_path / "words")
    shutil.copy(assets + "published_configs/stable_diffusion_2/tokenizer/tokenizer_config.json", tmp_path / "words")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "words")
    saved = lowtide.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("Ein Boot, über das Meer!  ⛵", "it's 1999's 3rd   photo...", "naïve café — 静かな海", ""):
        assert pipe.tokenizer(text).input_ids == theirs(text).input_ids == saved(text).input_ids


def test_what_the_file_says_that_it_predicts(tmp_path):
    file = write_sparse({**published_shapes("sd1"), "v_pred": (0,)}, tmp_path / "model.safetensors")
    for told, predicts in ((None, "v_prediction"), ("epsilon", "epsilon")):
        pipe = StableDiffusionPipeline.from_single_file(
            file, prediction_type=told, offload="sequential", offload_device="cpu"
        )
        assert pipe.scheduler.config.prediction_type == predicts


def test_a_scheduler_and_a_tokenizer_that_are_given_are_used(first):
    scheduler = tiny.scheduler("EulerDiscreteScheduler")
    pipe = from_file(first, scheduler=scheduler, tokenizer=first.folder / "tokenizer", prediction_type="v_prediction")
    assert pipe.scheduler.config == scheduler.config
    assert from_file(first, prediction_type="v_prediction").scheduler.config.prediction_type == "v_prediction"
    assert from_file(first, tokenizer=str(first.folder)).tokenizer("sea").input_ids == pipe.tokenizer("sea").input_ids


# ---- a VAE beside it


def vae_files(folder):
    """Another autoencoder, in every form that one is given in."""
    network = tiny.set_weights(tiny.vae(), seed=3)
    network.save_pretrained(folder / "alone")
    pipe = pipeline("sd1", folder / "words")
    pipe.vae = network
    pipe.save_pretrained(folder / "whole")
    state = {name: x for name, x in original_state("sd1", pipe).items() if name.startswith(VAE)}
    bare = {name.removeprefix(VAE): x for name, x in state.items()}
    by_ours = load_file(folder / "alone" / "diffusion_pytorch_model.safetensors")
    older = {
        name.replace("to_q", "query")
        .replace("to_k", "key")
        .replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): x
        for name, x in by_ours.items()
    }
    return network, {
        "the network": network,
        "a folder": folder / "alone",
        "a pipeline's folder": str(folder / "whole"),
        "a whole model": save(original_state("sd1", pipe), folder / "model.safetensors"),
        "with the prefix": save(state, folder / "prefixed.safetensors"),
        "without": save(bare, folder / "bare.safetensors"),
        "diffusers' names": save(by_ours, folder / "ours.safetensors"),
        "its older names": save(older, folder / "older.safetensors"),
    }


def test_a_vae_is_given_in_any_form(first, tmp_path):
    network, forms = vae_files(tmp_path)
    expected = make(from_folder(first, vae=network))
    assert not torch.equal(expected, make(from_folder(first)))
    file = changed_file(first, tmp_path, lambda state: [state.pop(name) for name in list(state) if VAE in name])
    for form, given in forms.items():
        assert torch.equal(make(from_file(first, vae=given)), expected), form
        assert torch.equal(make(from_file(first, file, vae=given)), expected), form
        assert torch.equal(make(from_folder(first, vae=given)), expected), form
    streamed = from_file(first, file, vae=forms["without"], offload="sequential")
    assert torch.equal(make(streamed), expected)
    assert attachment_of(streamed.vae).weights[0].rest.origin.file.path == forms["without"]


def test_what_is_no_vae(first, tmp_path):
    text = save({"text_model.x": torch.zeros(2)}, tmp_path / "text.safetensors")
    other = save(tiny.vae("no quant convs").state_dict(), tmp_path / "other.safetensors")
    for error, said, given in (
        (CheckpointError, r"holds no VAE: it has no first_stage_model.decoder.conv_in.weight", text),
        (FileNotFoundError, "there is no such file", tmp_path / "nowhere.safetensors"),
        (UnsafeWeightsError, "is pickled.* convert it once.* safetensors.torch.save_file", tmp_path / "vae.ckpt"),
        (CheckpointError, "do not match", other),
        (ValueError, "holds a UNet2DConditionModel, not a AutoencoderKL", first.folder / "unet"),
    ):
        (tmp_path / "vae.ckpt").write_bytes(b"x")
        with pytest.raises(error, match=said):
            from_file(first, vae=given)
