"""Clips under every plan for the weights, and with the decoder's own means: the plain run's, bit for bit."""

import itertools

import pytest
import torch
from tests import tiny, tiny_video
from tests.thinned import covering
from torch import nn

from lowtide.casting.cast_leaf import leaves
from lowtide.hooks import apply_group_offloading, apply_layerwise_casting
from lowtide.memory.attach import attachment_of
from lowtide.pipelines.cogvideox import CogVideoXPipeline

KINDS = list(tiny_video.TRANSFORMERS)
OFFLOADS = ("model", "block", "leaf", "sequential")
CASTINGS = ("fp8", "int8")
NETWORKS = ("text_encoder", "vae", "transformer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_video.write_checkpoint(folder / kind.replace(".", "-"), kind) for kind in KINDS}


def film(pipe, **call):
    """A clip in two steps, of a third of the usual pixels."""
    pipe.set_progress_bar_config(disable=True)
    defaults = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "max_sequence_length": tiny_video.MAX_TOKENS,
        "height": 16,
        "width": 32,
    }
    return pipe("a red panda", **{**defaults, "generator": tiny.seeded(3), **call}).frames


def load(folders, kind="5b", dtype="fp32", **options):
    return CogVideoXPipeline.from_pretrained(folders[kind], torch_dtype=DTYPES[dtype], **options)


@pytest.fixture(scope="module")
def plain(folders):
    """The plain run's clip of each kind, dtype and casting."""
    made = {}

    def get(kind="5b", dtype="fp32", casting=None):
        key = kind, dtype, casting
        if key not in made:
            made[key] = film(load(folders, kind, dtype, casting=casting))
        return made[key]

    return get


@pytest.mark.parametrize(("kind", "offload", "dtype"), covering(KINDS, OFFLOADS, DTYPES))
def test_loaded_under_an_offload(folders, plain, kind, offload, dtype):
    pipe = load(folders, kind, dtype, offload=offload, offload_device="cpu")
    assert all(attachment_of(module) is not None for module in pipe.modules().values())
    for _ in range(2):
        assert torch.equal(film(pipe), plain(kind, dtype))


@pytest.mark.parametrize(("kind", "offload", "casting"), covering(KINDS, [None, *OFFLOADS], CASTINGS))
def test_cast_while_loading(folders, plain, kind, offload, casting):
    pipe = load(folders, kind, "bf16", offload=offload, offload_device="cpu", casting=casting)
    assert all(leaves(module) for module in pipe.modules().values())
    assert torch.equal(film(pipe), plain(kind, "bf16", casting))
    assert not torch.equal(plain(kind, "bf16", casting), plain(kind, "bf16"))  # negative control


PLANS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "leaves ahead": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
    "two blocks": lambda pipe: pipe.enable_group_offload("cpu", num_blocks_per_group=2),
    "all but one": lambda pipe: pipe.enable_group_offload("cpu", exclude_modules="vae", use_stream=True),
}


def offloaded_by_the_document(pipe):
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="leaf_level", use_stream=True
    )
    apply_group_offloading(pipe.text_encoder, device, offload_type="block_level", num_blocks_per_group=2)
    apply_group_offloading(pipe.vae, device, offload_type="leaf_level")


PLANS["the document's"] = offloaded_by_the_document
PLANS_IN_TURN = list(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_plans_put_on_and_taken_off(folders, plain, name):
    pipe = load(folders)
    PLANS[name](pipe)
    assert torch.equal(film(pipe), plain())
    pipe.disable_group_offload()
    assert all(attachment_of(module) is None for module in pipe.modules().values())
    assert torch.equal(film(pipe), plain())


@pytest.mark.parametrize(
    ("names", "storage", "plans"),
    covering(
        [names for count in (1, 3) for names in itertools.combinations(NETWORKS, count)],
        [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
        [PLANS_IN_TURN[:3], PLANS_IN_TURN[2:4], PLANS_IN_TURN[3:]],
    ),
)
def test_networks_cast_one_by_one(folders, plain, names, storage, plans):
    """A cast network gives what it gives with the numbers that its 8 bits hold, under plans put on in turn."""
    pipe, rounded = load(folders, dtype="bf16"), load(folders, dtype="bf16")
    for name in names:
        cast(getattr(pipe, name), storage)
        state = {key: tensor.clone() for key, tensor in getattr(pipe, name).state_dict().items()}
        getattr(rounded, name).load_state_dict(state)
    expected = film(rounded)
    assert not torch.equal(expected, plain(dtype="bf16"))
    assert torch.equal(film(pipe), expected)
    for plan in plans:
        PLANS[plan](pipe)
        assert torch.equal(film(pipe), expected)


def cast(module, storage):
    options = {"storage_dtype": storage, "compute_dtype": torch.bfloat16}
    if hasattr(module, "enable_layerwise_casting"):
        module.enable_layerwise_casting(**options)
    else:
        apply_layerwise_casting(module, **options)


def test_the_documents_transformer_is_passed_in(folders):
    from lowtide.models.video_transformer import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        folders["5b"], subfolder="transformer", torch_dtype=torch.bfloat16
    )
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    pipe = load(folders, dtype="bf16", transformer=transformer).to("cpu")
    assert pipe.transformer is transformer
    cast_here = {id(owner) for leaf in leaves(transformer) for owner in leaf.owners}
    linear = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    left = [name for name, part in linear.items() if id(part) not in cast_here]
    assert left
    assert all(any(word in name for word in ("norm", "patch_embed", "proj_out")) for name in left)
    assert film(pipe).isfinite().all()


def test_both_kinds_of_weights_saved_in_8_bits(folders, tmp_path, plain):
    pipe = load(folders, dtype="bf16", casting="fp8")
    pipe.save_pretrained(tmp_path / "saved")
    again = CogVideoXPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert torch.equal(film(again), plain(dtype="bf16", casting="fp8"))
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*.safetensors"))  # noqa: E731
    assert size(tmp_path / "saved") < 0.5 * size(folders["5b"])


def test_slices_of_the_batch(folders):
    pipe = load(folders)
    call = {"num_videos_per_prompt": 2, "generator": None, "latents": tiny.numbers((2, 3, 4, 2, 4), 5)}
    expected = film(pipe, **call)
    pipe.enable_vae_slicing()
    assert torch.equal(film(pipe, **call), expected)
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_slicing


def test_tiles(folders):
    """One tile as large as the clip is the clip; smaller ones give nearly the clip, in every output type."""
    pipe, size = load(folders), {"height": 32, "width": 48}
    plain = film(pipe, **size)
    pipe.enable_vae_tiling(tile_size=(32, 48))
    assert torch.equal(film(pipe, **size), plain)
    pipe.enable_vae_tiling()
    tiled = film(pipe, **size)
    assert not torch.equal(tiled, plain)
    assert (tiled - plain).abs().mean() < 0.1
    assert torch.equal(torch.from_numpy(film(pipe, **size, output_type="np")), tiled.permute(0, 1, 3, 4, 2))
    pipe.disable_vae_tiling()
    assert torch.equal(film(pipe, **size), plain)


def test_row_by_row(folders, plain):
    """The published clip up to rounding, with progress in percent; what cannot be done is told before any step."""
    pipe, heard = load(folders), []
    pipe.enable_vae_tiling("exact", work=5_000)
    pipe.stages.observers.append(Steps(heard))
    assert tiny.difference(film(pipe, num_videos_per_prompt=2, generator=tiny.seeded(3, 4))[:1], plain()) < 1e-4
    assert heard == list(range(1, 101))
    pipe.enable_vae_tiling("exact", budget=1000)
    with pytest.raises(ValueError, match="budget"):
        film(pipe)
    assert len(heard) == 100
    pipe.stages.observers.clear()
    pipe.disable_vae_tiling()
    assert torch.equal(film(pipe), plain())


class Steps:
    def __init__(self, heard):
        self.heard = heard

    def stage_started(self, name, steps):
        assert name != "decode" or steps == 100

    def step_done(self, name, step):
        if name == "decode":
            self.heard.append(step)

    def stage_finished(self, name):
        pass


@pytest.mark.parametrize("backend", ["chunked", "math"])
def test_attention_by_other_kernels(folders, plain, backend):
    pipe = load(folders)
    pipe.set_attention_backend(backend)
    assert tiny.difference(film(pipe), plain()) < 1e-3
    pipe.set_attention_backend("sdpa")
    pipe.enable_attention_slicing("max")
    assert tiny.difference(film(pipe), plain()) < 1e-3
    pipe.disable_attention_slicing()
    assert torch.equal(film(pipe), plain())
