"""Pipelines from folders and back: components, variants, shards, dtypes, and every kind of broken folder."""

import json
import shutil
import sys

import pytest
import torch
from tests import tiny

import lowtide
from lowtide.loading import components as loading
from lowtide.loading.components import spec_of
from lowtide.loading.model_index import ComponentSpec, read_model_index
from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.image_processor import CLIPImageProcessor
from lowtide.pipelines import load
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.weights.fill import WeightsMismatchError
from lowtide.weights.index import CheckpointError, UnsafeWeightsError

NETWORKS = ("unet", "vae", "text_encoder", "safety_checker")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline with a safety checker, and the folder that holds it."""
    folder = tmp_path_factory.mktemp("whole")
    pipe = tiny.pipeline(tmp_path_factory.mktemp("words"), checker=True)
    pipe.save_pretrained(folder / "model")
    return pipe, folder / "model"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(whole[1], tmp_path / "model")


def rewrite(file, **entries):
    content = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def same_networks(one, other):
    states = [(getattr(one, name).state_dict(), getattr(other, name).state_dict()) for name in NETWORKS]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in states)


@pytest.mark.parametrize("cls", [DiffusionPipeline, StableDiffusionPipeline, lowtide.DiffusionPipeline])
def test_a_saved_pipeline_is_loaded(whole, cls):
    pipe, folder = whole
    loaded = cls.from_pretrained(folder)
    assert type(loaded) is StableDiffusionPipeline
    assert same_networks(loaded, pipe)
    assert loaded.scheduler.config == pipe.scheduler.config
    assert type(loaded.scheduler) is type(pipe.scheduler)
    texts = ["A red boat", "über das Meer ⛵"]
    assert loaded.tokenizer(texts).input_ids == pipe.tokenizer(texts).input_ids
    assert not any(parameter.requires_grad for part in loaded.modules().values() for parameter in part.parameters())


def test_the_folder_is_laid_out_as_published(whole):
    index = json.loads((whole[1] / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {key: value for key, value in index.items() if not key.startswith("_")} == {
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (whole[1] / f"{name}.safetensors").is_file()


@pytest.mark.parametrize(
    ("dtype", "variant", "shard_size"),
    [(torch.float32, None, "200KB"), (torch.float16, "half", None), (torch.bfloat16, "half", "100KB")],
)
def test_round_trip(tmp_path, dtype, shard_size, variant):
    pipe = tiny.pipeline(tmp_path / "words", checker=True).to(dtype)
    pipe.save_pretrained(tmp_path / "model", variant=variant, max_shard_size=shard_size)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", variant=variant, torch_dtype="auto")
    assert same_networks(loaded, pipe)
    dtypes = {tensor.dtype for network in loaded.modules().values() for tensor in network.parameters()}
    assert dtypes == {dtype}
    loaded.unet.conv_out.bias.add_(1)
    assert not same_networks(loaded, pipe)  # negative control


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_network_is_copied_where_the_dtype_is_the_files(tmp_path):
    pipe = tiny.pipeline(tmp_path / "words").to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for name, network in loaded.modules().items():
        (file,) = (tmp_path / "model" / name).glob("*.safetensors")
        assert tiny.mapped_files(network) == {str(file)}
        assert str(file) not in tiny.mapped_files(getattr(pipe, name))  # negative control


@pytest.mark.parametrize(("asked", "expected"), [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)])
def test_dtype_holds_for_every_network(tmp_path, whole, asked, expected):
    loaded = DiffusionPipeline.from_pretrained(whole[1], **asked)
    for network in loaded.modules().values():
        assert {p.dtype for p in network.parameters()} == {expected}
    with pytest.raises(ValueError, match="differ; give one of them"):
        DiffusionPipeline.from_pretrained(whole[1], torch_dtype="float16", dtype="float32")


def test_parts_given_are_used_and_need_no_folder(folder):
    shutil.rmtree(folder / "unet")
    unet, schedule = tiny.unet(), tiny.scheduler("EulerDiscreteScheduler")
    loaded = DiffusionPipeline.from_pretrained(folder, unet=unet, scheduler=schedule)
    assert loaded.unet is unet
    assert loaded.scheduler is schedule
    assert loaded.components["vae"] is loaded.vae


def test_optional_parts_may_be_left_out(folder):
    shutil.rmtree(folder / "safety_checker")
    loaded = DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    assert loaded.safety_checker is None
    loaded.save_pretrained(folder.parent / "again")
    index = json.loads((folder.parent / "again" / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert not (folder.parent / "again" / "safety_checker").exists()
    assert DiffusionPipeline.from_pretrained(folder.parent / "again").safety_checker is None


def test_a_checker_needs_its_eyes(whole):
    with pytest.raises(ValueError, match="safety_checker needs feature_extractor"):
        DiffusionPipeline.from_pretrained(whole[1], feature_extractor=None)


def test_a_part_that_the_pipeline_has_not(whole):
    with pytest.raises(ValueError, match=r"takes no \['controlnet'\]; its components are vae, text_encoder"):
        DiffusionPipeline.from_pretrained(whole[1], controlnet=None)


@pytest.mark.parametrize("entry", [[None, None], ..., "UNet2DConditionModel", {"a": 1}, None])
def test_a_part_that_the_index_has_not(folder, entry):
    rewrite(folder / "model_index.json", unet=entry)
    with pytest.raises(ValueError, match=r"The checkpoint has no unet: pass it in, as in from_pretrained\(..., unet="):
        DiffusionPipeline.from_pretrained(folder)
    assert DiffusionPipeline.from_pretrained(folder, unet=tiny.unet()).unet is not None


def test_a_part_of_the_checkpoint_that_we_do_not_use_is_told(folder):
    rewrite(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    with pytest.warns(UserWarning, match="StableDiffusionPipeline has no use for the checkpoint's image_encoder"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["unet", "scheduler", "tokenizer", "safety_checker"])
def test_a_missing_folder(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=f"has no folder '{name}', which its model_index.json names"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("unet", ["diffusers", "UNet3DConditionModel"]),
        ("text_encoder", ["transformers", "BertModel"]),
        ("scheduler", ["diffusers", "DDPMScheduler"]),
        ("vae", ["evil", "os.system"]),
    ],
)
def test_a_class_that_we_have_not_is_refused_before_anything_is_read(folder, name, entry):
    rewrite(folder / "model_index.json", **{name: entry})
    shutil.rmtree(folder / "unet")
    with pytest.raises(
        ValueError, match=f"Component '{name}' is a '{entry[1]}' of '{entry[0]}', which Lowtide"
    ) as caught:
        DiffusionPipeline.from_pretrained(folder)
    for word in ("UNet2DConditionModel", "PNDMScheduler", f"from_pretrained(..., {name}=...)"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "/etc", "a/b", "..", "", "unet\0", "C:\\x", "un et"])
def test_a_part_whose_name_is_a_path_is_refused(folder, name):
    rewrite(folder / "model_index.json", **{name: ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(CheckpointError, match="cannot be the name of a component"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("entry", [[], ["diffusers"], ["a", "b", "c"], [1, 2], ["diffusers", ["x"]], [["x"], None]])
def test_an_entry_that_is_no_pair(folder, entry):
    rewrite(folder / "model_index.json", unet=entry)
    with pytest.raises(CheckpointError, match=r"entry 'unet' must be \[library, class\], not"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["FluxPipeline", "", ..., 3, ["StableDiffusionPipeline"], "../x", "os.system"])
def test_a_pipeline_that_we_have_not(folder, name):
    rewrite(folder / "model_index.json", _class_name=name)
    with pytest.raises(
        ValueError, match=r"is (a .*make pictures.*StableDiffusionPipeline.*lowtide\.load|not possible; it is the name)"
    ):
        DiffusionPipeline.from_pretrained(folder)


def test_a_folder_without_an_index_says_what_it_holds(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no model_index.json.*it holds \['config.json', 'diffusion_pytorch_mod"
    ):
        DiffusionPipeline.from_pretrained(folder / "unet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        DiffusionPipeline.from_pretrained(tmp_path / "empty")


def test_configs_that_do_not_fit_the_weights(folder):
    rewrite(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(WeightsMismatchError, match=r"CLIPTextModel and its weights in .*text_encoder"):
        DiffusionPipeline.from_pretrained(folder)


def test_only_pickled_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeWeightsError, match=r"diffusion_pytorch_model.bin.*it is never opened"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="pickled weights can run code, so they are refused"):
        DiffusionPipeline.from_pretrained(folder, use_safetensors=False)


def test_a_missing_variant_lists_those_that_are_there(folder):
    with pytest.raises(
        FileNotFoundError, match=r"no 'diffusion_pytorch_model' weights of variant 'fp16'.*variant=None"
    ):
        DiffusionPipeline.from_pretrained(folder, variant="fp16")


def test_text_encoders_of_older_files(tmp_path):
    """With the prefix `text_model.`, with position ids, and from a whole CLIP's own names without it."""
    from safetensors.torch import load_file, save_file

    encoder = tiny.text_encoder()
    loading.save_component(encoder, tmp_path / "text", variant=None, max_shard_size=None)
    file = tmp_path / "text" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    assert all(name.startswith("text_model.") for name in tensors)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for layout in ({**tensors, "text_model.embeddings.position_ids": torch.arange(16)[None]}, bare):
        save_file(layout, file)
        loaded = CLIPTextModel.from_folder(tmp_path / "text", dtype=None)
        tokens = torch.tensor([[516, 3, 4, 517]])
        with torch.no_grad():
            assert tiny.difference(loaded(tokens)[0], encoder(tokens)[0]) < 1e-5


def test_lines_of_the_index(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "a": ["l", "C"], "b": [None, None], "requires_safety_checker": True})
    )
    name, components, settings = read_model_index(tmp_path)
    assert name == "X"
    assert components == {"a": ComponentSpec("a", "l", "C"), "b": None}
    assert settings == {"requires_safety_checker": True}
    assert spec_of("text_encoder", tiny.text_encoder()).library == "transformers"


def test_lists_of_numbers_without_a_folder_are_settings(tmp_path):
    layers = {"text_encoder_select_layers": [2, 5, 8], "guidance_schedule": [[7.0], [3.0]], "patches": []}
    index = {"_class_name": "Krea2Pipeline", "vae": ["diffusers", "AutoencoderKLQwenImage"], **layers}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    name, components, settings = read_model_index(tmp_path)
    assert (name, list(components), settings) == ("Krea2Pipeline", ["vae"], layers)
    (tmp_path / "patches").mkdir()  # the control: what has a folder is a component
    with pytest.raises(CheckpointError, match=r"entry 'patches' must be \[library, class\], not"):
        read_model_index(tmp_path)


def test_a_pipeline_can_be_saved_over_itself(whole, folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.save_pretrained(folder, max_shard_size="100KB")
    again = DiffusionPipeline.from_pretrained(folder)
    assert same_networks(loaded, whole[0])
    assert same_networks(again, whole[0])
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("broken_part", ["vae", "scheduler", "feature_extractor"])
def test_a_save_that_fails_leaves_what_was_there(whole, folder, monkeypatch, broken_part):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    save = load.save_component

    def save_until(component, target, **options):
        if target.name == broken_part:
            raise OSError("no space left")
        save(component, target, **options)

    monkeypatch.setattr(load, "save_component", save_until)
    pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float16)
    with pytest.raises(OSError, match="no space left"):
        pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert same_networks(DiffusionPipeline.from_pretrained(folder), whole[0])


def test_a_part_that_cannot_be_saved(whole, tmp_path):
    class Foreign(torch.nn.Module):
        config = None

    parts = {**whole[0].components, "unet": Foreign()}
    with pytest.raises(ValueError, match="The unet is a Foreign, which cannot be saved"):
        StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_of_image_processors_over_the_years(folder):
    for name in ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil", "CLIPImageProcessorFast"):
        rewrite(folder / "model_index.json", feature_extractor=["transformers", name])
        eyes = DiffusionPipeline.from_pretrained(folder).feature_extractor
        assert isinstance(eyes, CLIPImageProcessor)
        assert eyes.size["shortest_edge"] == 16


def test_where_some_parts_have_no_such_variant_their_plain_weights_are_loaded(folder, tmp_path):
    """A mixture, as other libraries load it too; which parts fall back is said."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    for file in (mixed / "unet").glob("*.safetensors"):
        file.unlink()
    pipe.unet.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    shutil.copy(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors", mixed / "unet")
    with pytest.warns(UserWarning, match=r"has no variant 'fp16' of vae, text_encoder.*the plain weights are loaded"):
        loaded = DiffusionPipeline.from_pretrained(mixed, variant="fp16", dtype="auto")
    assert loaded.unet.dtype == torch.float16
    assert loaded.vae.dtype == torch.float32
    with pytest.warns(UserWarning, match="the plain weights are loaded"):
        loaded = DiffusionPipeline.from_pretrained(mixed, variant="fp16", ram="64GB")
    assert loaded.unet.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"variant 'fp16'.*There are: variant=None"):
        DiffusionPipeline.from_pretrained(folder, variant="fp16")  # negative control: none of the parts has it
    with pytest.raises(FileNotFoundError, match=r"There are: variant='fp16'"):
        DiffusionPipeline.from_pretrained(mixed)
