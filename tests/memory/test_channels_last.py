"""Channels last: the strides stay under every plan, and nothing is held twice."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from tests import tiny
from tests.memory.cases import CASES, RULES, put
from tests.memory_peaks import peak_bytes
from tests.thinned import covering, thinned
from torch import nn

from lowtide import UNet2DConditionModel
from lowtide.memory import detach
from lowtide.memory.store import DiskRest
from lowtide.models.mixin import ModelMixin

LAST = torch.channels_last
STRIDE = (36, 1, 12, 4)  # of conv_in's weight [8, 4, 3, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that is read alone."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.unet(**tiny.FEW_BLOCKS).save_pretrained(folder)
    return folder


@functools.cache
def in_last(name: str, dtype: torch.dtype) -> torch.Tensor:
    case = CASES[name](dtype)
    case.module.to(memory_format=LAST)
    return case.run()


@pytest.mark.parametrize(("before", "rule", "zero_copy"), covering([True, False], RULES, [True, False]))
def test_strides_stay_under_every_rule(before, rule, zero_copy):
    case = CASES["unet"](torch.bfloat16)
    if before:
        case.module.to(memory_format=LAST)
    put(case.module, RULES[rule], zero_copy=zero_copy)
    case.module.to(memory_format=LAST)
    assert case.module.conv_in.weight.stride() == STRIDE
    assert case.module.state_dict()["conv_in.weight"].stride() == STRIDE
    seen: list[tuple[int, ...]] = []
    case.module.conv_in.register_forward_pre_hook(lambda module, _: seen.append(module.weight.stride()))
    assert torch.equal(case.run(), in_last("unet", torch.bfloat16))
    assert torch.equal(case.run(), in_last("unet", torch.bfloat16))
    assert seen == [STRIDE] * 2
    detach(case.module)
    assert case.module.conv_in.weight.stride() == STRIDE
    assert torch.equal(case.run(), in_last("unet", torch.bfloat16))


@pytest.mark.parametrize(
    ("offload", "dtype"), thinned(["model", "block", "leaf", "sequential"], [torch.float32, torch.bfloat16])
)
def test_weights_of_a_checkpoint_go_on_resting_in_its_file(folder, offload, dtype):
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny.unet_inputs().items()
    }
    plain = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
    plain.to(memory_format=LAST)
    with torch.no_grad():
        expected = plain(**inputs).sample
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, offload=offload, offload_device="cpu")
    for _ in range(2):
        model.to(memory_format=LAST)
        assert all(isinstance(parameter.weight.rest, DiskRest) for parameter in model.parameters())
        with torch.no_grad():
            assert torch.equal(model(**inputs).sample, expected)
    model.to(memory_format=torch.contiguous_format)
    assert model.conv_in.weight.stride() == (36, 9, 3, 1)
    model.disable_group_offload()
    model.to(memory_format=LAST)
    model.enable_group_offload("cpu", offload_type="leaf_level")
    assert all(isinstance(parameter.weight.rest, DiskRest) for parameter in model.parameters())


def test_another_dtype_under_a_rule_reads_nothing(folder):
    inputs = tiny.unet_inputs()
    model = UNet2DConditionModel.from_pretrained(folder, offload="leaf", offload_device="cpu")
    model.to(torch.bfloat16)
    assert all(isinstance(parameter.weight.rest, DiskRest) for parameter in model.parameters())
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        plain = tiny.unet(**tiny.FEW_BLOCKS).to(torch.bfloat16)
        assert torch.equal(model(**half).sample, plain(**half).sample)
        model.to(torch.float32)  # from the file again, rounded as the plain one is
        assert all(isinstance(parameter.weight.rest, DiskRest) for parameter in model.parameters())
        assert torch.equal(model(**inputs).sample, plain.to(torch.float32)(**inputs).sample)


def test_a_part_alone(folder):
    model = UNet2DConditionModel.from_pretrained(folder, offload="leaf", offload_device="cpu")
    model.conv_in.to(memory_format=LAST)
    assert model.conv_in.weight.stride() == STRIDE
    assert model.conv_out.weight.is_contiguous()


class Wide(ModelMixin):
    """Convolutions of 64 MiB in all."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList([nn.Conv2d(456, 512, 3, bias=False) for _ in range(8)])


@pytest.mark.slow
def test_no_second_copy(tmp_path):
    from lowtide.models.put_weights import put_weights
    from lowtide.weights.index import find_weights
    from lowtide.weights.save import save_tensors

    save_tensors(Wide().state_dict(), tmp_path, "model")
    with torch.device("meta"):
        model = Wide()
    put_weights(model, find_weights(tmp_path, "model"), dtype=torch.float32)
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    peak = peak_bytes(lambda: model.to(memory_format=LAST))
    assert peak < total + 2 * largest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(parameter.is_contiguous(memory_format=LAST) for parameter in model.parameters())
