"""int4 against weights that were rounded beforehand: the same bits, under every rule, from files, whatever is done."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.casting.test_casting import rounded
from tests.memory.cases import RULES, Case, Toy, put
from tests.thinned import covering
from torch import nn

from lowtide import Casting, StableDiffusionPipeline, UNet2DConditionModel
from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.block_weight import BlockWeight
from lowtide.casting.cast_leaf import leaves
from lowtide.casting.cast_module import CASTABLE
from lowtide.casting.cast_weight import small_of
from lowtide.casting.casting import NEVER_CAST
from lowtide.casting.scratch import SCRATCH
from lowtide.hooks import apply_layerwise_casting
from lowtide.memory import attachment_of, detach
from lowtide.memory.store import DiskRest
from lowtide.ops.block_layout import Q4_0, in_whole_blocks
from lowtide.ops.block_quantization import dequantize_blocks, quantize_blocks
from lowtide.weights.fill import WeightsMismatchError

INT4, INT8 = Casting("int4"), Casting("int8")
WIDE = {**tiny.FEW_BLOCKS, "block_out_channels": [32, 32], "cross_attention_dim": 32}
"""Of a U-Net whose weights are in whole blocks, but for `conv_in`, whose rows have 36 numbers."""


def held(weight: torch.Tensor) -> torch.Tensor:
    """What 4 bits hold of a weight, or 8 where its rows are no whole blocks."""
    if not in_whole_blocks(weight.shape):
        return rounded(weight, INT8)
    return dequantize_blocks(quantize_blocks(weight.detach(), Q4_0), torch.empty_like(weight))


def round_offline(module: nn.Module) -> nn.Module:
    """Round the weights that int4 means, in place."""
    done: set[int] = set()
    for name, layer in module.named_modules(remove_duplicate=False):
        parts = [".".join(name.split(".")[: count + 1]) for count in range(name.count(".") + 1)]
        if any(re.search(pattern, part) for pattern in NEVER_CAST for part in parts):
            continue
        for parameter in layer._parameters.values() if isinstance(layer, CASTABLE) else ():
            if parameter is not None and parameter.dim() > 1 and id(parameter) not in done:
                done.add(id(parameter))
                parameter.data.copy_(held(parameter))
    return module


def toy(dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (2, 4))
    return Case(Toy(32).to(dtype).eval(), lambda module: module(ids))


def unet(dtype: torch.dtype) -> Case:
    inputs = tiny.unet_inputs()
    inputs["encoder_hidden_states"] = tiny.numbers((2, 7, 32), 2)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return Case(tiny.unet(**WIDE).to(dtype), lambda module: module(**inputs).sample)


def convolutions(dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 2), nn.Conv2d(32, 5, 1)
    )
    x = torch.randn(1, 3, 12, 12).to(dtype)
    return Case(layers.to(dtype).eval(), lambda module: module(x))


CASES = {"toy": toy, "unet": unet, "convolutions": convolutions}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def reference(name: str, dtype: str) -> torch.Tensor:
    case = CASES[name](DTYPES[dtype])
    plain = case.run()
    round_offline(case.module)
    assert not torch.equal(case.run(), plain), "rounding must change what comes out"
    return case.run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cast_equals_weights_rounded_beforehand(name, dtype):
    case = CASES[name](DTYPES[dtype])
    apply_casting(case.module, INT4)
    for _ in range(2):
        assert torch.equal(case.run(), reference(name, dtype))
    weights = [weight for leaf in leaves(case.module) for weight in leaf.weights]
    assert any(isinstance(weight, BlockWeight) for weight in weights)
    for weight in weights:
        size = torch.Size(weight.form.shape).numel()
        is_whole = in_whole_blocks(weight.form.shape)
        assert weight.nbytes == weight.rest.flat.numel() == INT4.nbytes(weight.form.shape)
        assert isinstance(weight, BlockWeight) == is_whole == (weight.nbytes == size * 18 // 32)


@pytest.mark.parametrize(("name", "rule", "zero_copy"), covering(CASES, RULES, [True, False]))
def test_cast_under_every_rule(name, rule, zero_copy):
    case = CASES[name](torch.float32)
    apply_casting(case.module, INT4)
    attachment = put(case.module, RULES[rule], zero_copy=zero_copy)
    for _ in range(2):
        assert torch.equal(case.run(), reference(name, "fp32"))
    assert attachment.stream.ledger.peak <= attachment.bound
    detach(case.module)
    assert torch.equal(case.run(), reference(name, "fp32"))


def test_bytes_that_move_are_the_small_ones():
    moved = {}
    for how in (INT8, INT4):
        case = unet(torch.float32)
        apply_casting(case.module, how)
        attachment = put(case.module, RULES["leaves ahead"], zero_copy=False)
        case.run()
        moved[how.storage] = attachment.stream.ledger.moved
    assert moved["int4"] < 0.7 * moved["int8"]


@pytest.mark.parametrize("rule", [None, "blocks ahead"])
def test_state_copies_pickles_and_conversions(rule):
    case, right = unet(torch.float32), reference("unet", "fp32")
    apply_casting(case.module, INT4)
    if rule is not None:
        put(case.module, RULES[rule])
    state = case.module.state_dict()
    offline = round_offline(unet(torch.float32).module).state_dict()
    assert all(torch.equal(tensor, offline[name]) for name, tensor in state.items())
    for made in (copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))):
        assert not leaves(made)
        with torch.no_grad():
            assert torch.equal(case.call(made), right)
    resting = small_of(case.module.conv_out.weight).nbytes
    case.module.to(torch.bfloat16)  # the 4 bits stay, and what they hold is rounded to bfloat16
    half = unet(torch.bfloat16)
    half.module.load_state_dict(offline)
    assert small_of(case.module.conv_out.weight).nbytes == resting
    with torch.no_grad():
        assert torch.equal(half.call(case.module), half.run())
        case.module.load_state_dict(state)  # loaded numbers are cast
        round_offline(half.module)
        assert torch.equal(half.call(case.module), half.run())


def test_channels_last_weights_keep_their_blocks():
    case, plain = unet(torch.float32), unet(torch.float32)
    apply_casting(case.module, INT4)
    small = small_of(case.module.conv_out.weight)
    before = small.rest.flat.clone()
    case.module.to(memory_format=torch.channels_last)
    assert case.module.conv_out.weight.stride() == (288, 1, 96, 32)
    assert case.module.state_dict()["conv_out.weight"].stride() == (288, 1, 96, 32)
    assert torch.equal(small_of(case.module.conv_out.weight).rest.flat, before)
    round_offline(plain.module).to(memory_format=torch.channels_last)
    assert torch.equal(case.run(), plain.run())
    cast_last = unet(torch.float32)
    cast_last.module.to(memory_format=torch.channels_last)
    apply_casting(cast_last.module, INT4)
    assert torch.equal(cast_last.run(), plain.run())
    case.module.to(memory_format=torch.contiguous_format)
    assert torch.equal(case.run(), reference("unet", "fp32"))


def test_embeddings_give_rows_alone():
    embedding = nn.Embedding(1000, 64)
    right = held(embedding.weight)
    apply_casting(nn.Sequential(embedding), INT4)
    SCRATCH.release()
    for ids in (torch.tensor([[0, 999], [5, 5]]), torch.tensor(7), torch.zeros(0, 3, dtype=torch.int64)):
        with torch.no_grad():
            assert torch.equal(embedding(ids), right[ids])
    assert not SCRATCH._free
    with pytest.raises(IndexError):
        embedding(torch.tensor([1000]))


def test_undone_it_keeps_what_4_bits_hold_where_there_is_no_file():
    case = unet(torch.float32)
    apply_layerwise_casting(case.module, torch.int4, torch.float32)
    with pytest.warns(UserWarning, match="in no file"):
        remove_casting(case.module)
    assert torch.equal(case.run(), reference("unet", "fp32"))


def test_other_castings_begin_from_what_there_is():
    layers = nn.Sequential(nn.Linear(64, 8))
    weight = layers[0].weight.detach().clone()
    apply_casting(layers, INT4)
    resting = small_of(layers[0].weight)
    apply_casting(layers, INT4)  # as it is: nothing to do
    assert small_of(layers[0].weight) is resting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_casting(layers, INT8)
        assert torch.equal(layers.state_dict()["0.weight"], rounded(held(weight), INT8))
        apply_casting(layers, INT4)
    assert torch.equal(layers.state_dict()["0.weight"], held(rounded(held(weight), INT8)))


def test_written_weights_are_cast():
    layers, new = nn.Sequential(nn.Linear(64, 8)), torch.randn(8, 64)
    apply_casting(layers, INT4)
    layers.load_state_dict({"0.weight": new, "0.bias": torch.zeros(8)}, assign=True)
    assert torch.equal(layers.state_dict()["0.weight"], held(new))
    with pytest.raises(ValueError, match=r"0\.weight: .* not finite"):
        layers.load_state_dict({"0.weight": new / 0, "0.bias": torch.zeros(8)})


# ---- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that is read alone."""
    folder = tmp_path_factory.mktemp("saved") / "unet"
    tiny.unet(**WIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """The same in 4 bits, read alone."""
    small = tmp_path_factory.mktemp("saved") / "small"
    UNet2DConditionModel.from_pretrained(folder, casting="int4").save_pretrained(small)
    return small


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(torch.float32).call(model)


@pytest.mark.parametrize("offload", [None, "model", "leaf", "sequential"])
def test_cast_while_loading(folder, offload):
    options = {} if offload is None else {"offload": offload, "offload_device": "cpu"}
    model = UNet2DConditionModel.from_pretrained(folder, casting="int4", **options)
    assert torch.equal(run(model), reference("unet", "fp32"))
    model.disable_layerwise_casting()  # without a warning: the file has the weights as they were
    assert torch.equal(run(model), unet(torch.float32).run())


def test_saved_in_4_bits_and_loaded_again(small, tmp_path):
    file = load_file(small / "diffusion_pytorch_model.safetensors")
    assert (file["conv_out.weight"].dtype, file["conv_out.weight"].shape) == (torch.uint8, (4, 9, 18))
    assert (file["conv_in.weight"].dtype, file["conv_in.weight_scale"].shape) == (torch.int8, (32, 1, 1, 1))
    assert "conv_out.weight_scale" not in file
    again = UNet2DConditionModel.from_pretrained(small, torch_dtype="auto")
    assert again.dtype == torch.float32
    assert all(isinstance(weight.rest, DiskRest) for leaf in leaves(again) for weight in leaf.weights)
    assert torch.equal(run(again), reference("unet", "fp32"))
    for rule in ("sequential", "blocks ahead", "blocks on the host"):
        put(again, RULES[rule])
        assert torch.equal(run(again), reference("unet", "fp32"))
    again.disable_group_offload()
    again.save_pretrained(tmp_path / "twice")
    for name, tensor in load_file(tmp_path / "twice" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor.view(torch.uint8), file[name].view(torch.uint8)), name


def test_4_bits_on_disk_move_4_bits(folder, small):
    moved = {}
    for place in (folder, small):
        model = UNet2DConditionModel.from_pretrained(place, offload="leaf", offload_device="cpu")
        run(model)
        moved[place] = attachment_of(model).stream.ledger.moved
    assert moved[small] < 0.25 * moved[folder]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            torch.zeros(4, 9, 17, dtype=torch.uint8),
            r"conv_out\.weight: \[4, 32, 3, 3\] in the model, uint8 \[4, 9, 17\]",
        ),
        (torch.zeros(4, 8, 18, dtype=torch.uint8), r"uint8 \[4, 8, 18\] .* Weights in blocks are"),
        (torch.zeros(4, 9, 34, dtype=torch.uint8), None),
    ],
)
def test_damaged_checkpoints_are_told(small, tmp_path, changed, said):
    tensors = load_file(small / "diffusion_pytorch_model.safetensors")
    tensors["conv_out.weight"] = changed
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    if said is None:  # blocks of 8 bits
        assert (
            not run(UNet2DConditionModel.from_pretrained(tmp_path)).sub(tensors["conv_out.bias"].view(-1, 1, 1)).any()
        )
        return
    with pytest.raises(WeightsMismatchError, match=said):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_scale_beside_blocks_is_told(small, tmp_path):
    tensors = load_file(small / "diffusion_pytorch_model.safetensors")
    tensors["conv_out.weight_scale"] = torch.ones(4, 1, 1, 1)
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"conv_out\.weight_scale"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_whole_pipeline(tmp_path):
    tiny.pipeline(tmp_path / "words").save_pretrained(tmp_path / "pipe")

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a cat", num_inference_steps=2, generator=tiny.seeded(0), output_type="pt").images

    first = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", casting="int4")
    picture = draw(first)
    assert leaves(first.text_encoder)
    first.save_pretrained(tmp_path / "small")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "small")
    assert torch.equal(draw(again), picture)
    again.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(draw(again), picture)
