"""Casting while loading, and checkpoints whose weights are in 8 bits."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.casting.test_casting import CASTINGS, round_offline
from tests.memory.cases import RULES, put
from tests.thinned import covering, thinned

from lowtide import Casting, StableDiffusionPipeline, UNet2DConditionModel
from lowtide.casting.cast_leaf import leaves
from lowtide.memory import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.models.clip_text import CLIPTextModel
from lowtide.weights.fill import WeightsMismatchError

STORED = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that is read alone."""
    folder = tmp_path_factory.mktemp("saved") / "unet"
    tiny.unet(**tiny.FEW_BLOCKS).save_pretrained(folder)
    return folder


def run(module):
    inputs = {
        name: value.to(module.dtype) if value.is_floating_point() else value
        for name, value in tiny.unet_inputs().items()
    }
    with torch.no_grad():
        return module(**inputs).sample


@functools.cache
def expected(dtype, how):
    return run(round_offline(tiny.unet(**tiny.FEW_BLOCKS).to(dtype), CASTINGS[how]))


@pytest.mark.parametrize(("how", "dtype"), covering(CASTINGS, [torch.float32, torch.bfloat16]))
def test_cast_while_loading_equals_cast_afterwards(folder, dtype, how):
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, casting=CASTINGS[how])
    assert model.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert torch.equal(run(model), expected(dtype, how))
    model.disable_layerwise_casting()  # without a warning: the file has the weights as they were
    assert torch.equal(run(model), run(tiny.unet(**tiny.FEW_BLOCKS).to(dtype)))


@pytest.mark.parametrize("offload", ["model", "block", "leaf", "sequential"])
def test_cast_while_loading_under_an_offload(folder, offload):
    model = UNet2DConditionModel.from_pretrained(folder, casting="int8", offload=offload, offload_device="cpu")
    assert torch.equal(run(model), expected(torch.float32, "int8"))
    assert attachment_of(model) is not None
    model.disable_group_offload()
    assert torch.equal(run(model), expected(torch.float32, "int8"))


@pytest.mark.parametrize(("how", "shards", "variant"), covering(CASTINGS, [None, 2000], [None, "small"]))
def test_saved_in_8_bits_and_loaded_again(folder, tmp_path, how, shards, variant):
    own = torch.bfloat16 if how == "int8" else torch.float32  # slow in bfloat16 on some processors
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=own, casting=CASTINGS[how])
    model.save_pretrained(tmp_path / "saved", max_shard_size=shards, variant=variant)
    files = {
        name: tensor for file in (tmp_path / "saved").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert files["conv_in.weight"].dtype == STORED[CASTINGS[how].storage]
    assert ("conv_in.weight_scale" in files) == CASTINGS[how].scaled
    assert files["conv_norm_out.weight"].dtype == own
    for dtype in (own, "auto"):
        again = UNet2DConditionModel.from_pretrained(tmp_path / "saved", torch_dtype=dtype, variant=variant)
        assert again.dtype == own
        assert leaves(again)
        assert all(isinstance(weight.rest, DiskRest) for leaf in leaves(again) for weight in leaf.weights)
        assert torch.equal(run(again), expected(own, how))
        for rule in ("sequential", "blocks ahead", "blocks on the host"):
            put(again, RULES[rule])
            assert torch.equal(run(again), expected(own, how))
        again.disable_group_offload()
        again.save_pretrained(tmp_path / "twice")
        for name, tensor in load_file(tmp_path / "twice" / "diffusion_pytorch_model.safetensors").items():
            assert torch.equal(tensor.view(torch.uint8), files[name].view(torch.uint8)), name


def test_what_is_in_8_bits_already_is_not_cast_again(folder, tmp_path):
    UNet2DConditionModel.from_pretrained(folder, casting="int8").save_pretrained(tmp_path / "saved")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "saved", casting="fp8")  # without a warning
    assert torch.equal(run(model), expected(torch.float32, "int8"))


def test_8_bits_on_disk_move_8_bits(folder, tmp_path):
    model = UNet2DConditionModel.from_pretrained(folder, casting="int8")
    model.save_pretrained(tmp_path / "saved")
    moved = {}
    for place in (folder, tmp_path / "saved"):
        model = UNet2DConditionModel.from_pretrained(place, offload="leaf", offload_device="cpu")
        run(model)
        attachment = attachment_of(model)
        assert attachment is not None
        moved[place] = attachment.stream.ledger.moved
    assert moved[tmp_path / "saved"] < 0.45 * moved[folder]


@pytest.mark.parametrize("casting", ["fp8", "int8"])
def test_a_whole_pipeline(tmp_path, casting):
    tiny.pipeline(tmp_path / "words").save_pretrained(tmp_path / "pipe")

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images

    first = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", casting=casting)
    picture = draw(first)
    assert leaves(first.text_encoder)
    assert leaves(first.vae)
    first.save_pretrained(tmp_path / "small")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "small")
    assert torch.equal(draw(again), picture)
    again.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(draw(again), picture)
    again.to("cpu")
    assert torch.equal(draw(again), picture)
    assert leaves(again.unet)
    again.to(torch.bfloat16)
    assert again.unet.dtype == again.text_encoder.dtype == torch.bfloat16
    assert not torch.equal(draw(again).float(), picture)


def test_text_encoders_keep_their_published_names(tmp_path):
    pipe = tiny.pipeline(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "pipe")
    small = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", casting="int8")
    small.save_pretrained(tmp_path / "small")
    names = load_file(tmp_path / "small" / "text_encoder" / "model.safetensors")
    scales = [name for name in names if name.endswith("_scale")]
    assert scales
    assert all(name.removesuffix("_scale") in names for name in scales)
    assert isinstance(pipe.text_encoder, CLIPTextModel)


def damaged(folder, tmp_path, change):
    UNet2DConditionModel.from_pretrained(folder, casting="int8").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return UNet2DConditionModel.from_pretrained(tmp_path / "saved")


def drop_scale(tensors):
    del tensors["conv_in.weight_scale"]


def wrong_scale(tensors):
    tensors["conv_in.weight_scale"] = torch.ones(3, 1, 1, 1)


def wrong_shape(tensors):
    tensors["conv_in.weight"] = torch.ones(8, 4, 1, 1, dtype=torch.int8)


def stray_scale(tensors):
    tensors["conv_in.bias_scale"] = torch.ones(8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_scale, r"conv_in\.weight is int8 .* conv_in\.weight_scale is not there"),
        (wrong_scale, r"conv_in\.weight_scale .* one number for each output channel of \[8, 4, 3, 3\]"),
        (wrong_shape, r"conv_in\.weight: \[8, 4, 3, 3\] in the model, \[8, 4, 1, 1\]"),
        (stray_scale, r"In the file, not in the model.*\n.*conv_in\.bias_scale"),
    ],
)
def test_damaged_checkpoints_are_told(folder, tmp_path, change, said):
    with pytest.raises(WeightsMismatchError, match=said):
        damaged(folder, tmp_path, change)


def test_what_cannot_be_is_told(folder):
    with pytest.raises(ValueError, match="casting='int3' is not possible: it is one of fp8, int8, int8_dynamic, int4"):
        UNet2DConditionModel.from_pretrained(folder, casting="int3")
    with pytest.raises(ValueError, match="storage='int3' is not possible: it is one of float8_e4m3fn"):
        Casting("int3")
    model = UNet2DConditionModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"storage_dtype=torch\.float16 is not possible: .* torch\.float8_e4m3fn"):
        model.enable_layerwise_casting(storage_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"compute_dtype=torch\.int8 is not possible"):
        model.enable_layerwise_casting(compute_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"skip_modules_pattern '\(' is not a regular expression"):
        model.enable_layerwise_casting(skip_modules_pattern="(")
    assert not leaves(model)
    config = model.config
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(config)
    with pytest.raises(ValueError, match="on meta: it has a shape and no values to cast"):
        empty.enable_layerwise_casting()
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"conv_in\.weight: .* not finite"):
        model.enable_layerwise_casting(torch.int8)


@pytest.mark.parametrize(
    ("compute", "file_dtype", "rule"),
    thinned(
        [torch.float32, torch.bfloat16, torch.float16],
        [torch.float32, torch.bfloat16],
        ["sequential", "blocks on the host", "model"],
    ),
)
def test_what_is_not_cast_gets_the_dtype_and_keeps_its_values(tmp_path, compute, file_dtype, rule):
    tiny.unet(**tiny.FEW_BLOCKS).to(file_dtype).save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=file_dtype)
    put(model, RULES[rule])
    model.enable_layerwise_casting(torch.int8, compute)
    right = tiny.unet(**tiny.FEW_BLOCKS).to(file_dtype).to(compute).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == compute
        if tensor.dim() == 1:
            assert torch.equal(tensor, right[name]), name
    model.disable_layerwise_casting()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, right[name]), name


def conversions(model):
    yield model.double
    yield model.float
    yield lambda: model.to(memory_format=torch.channels_last)
    yield lambda: model.to(memory_format=torch.contiguous_format)
    yield model.bfloat16
    yield lambda: model.enable_layerwise_casting(torch.int8)


def test_tensors_that_others_hold_are_not_lost(tmp_path):
    """Pages of a file may be dropped, memory may not: copies made by conversions have an origin in a file too."""
    config = {**tiny.UNETS["sd1"], **tiny.FEW_BLOCKS, "block_out_channels": [64, 64], "cross_attention_dim": 64}
    big = tiny.set_weights(UNet2DConditionModel.from_config(config))
    big.save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    held: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for convert in conversions(model):
        state = model.state_dict()
        held.append((state, {name: tensor.clone() for name, tensor in state.items()}))
        convert()
        for now, then in held:
            for name in now:
                assert torch.equal(now[name], then[name]), name
