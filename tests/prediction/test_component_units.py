"""The units of a component are those that attaching makes, with all the work of a call."""

import functools
from dataclasses import replace

import pytest
import torch
from tests.memory_peaks import peak_bytes
from tests.prediction.prediction_cases import SEASCAPES, quick_cases

from lowtide.casting.apply_casting import apply_casting, named_casting
from lowtide.casting.cast_weight import CastWeight
from lowtide.memory.attach import attach, attachment_of, detach
from lowtide.memory.bounds import aligned
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.memory.stream import Stream
from lowtide.models.unet import UNet2DConditionModel
from lowtide.prediction.component import component, trace
from lowtide.prediction.meta_copy import meta_copy, weights_in_files
from lowtide.weights.files import InFile
from lowtide.weights.fill import state_names
from lowtide.weights.index import find_weights

CASES = {str(case): case for case in quick_cases()}
UNET = CASES["seascapes U-Net 2 of 16-float32"]
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


def profiled(case=UNET, **options):
    module, traced = traced_on_meta(case)
    return component("network", module, traced=traced, **options), traced


def traced_on_meta(case):
    module = case.module("meta")
    inputs = tuple(torch.empty_like(one, device="meta") for one in case.tensors())
    return module, trace(lambda: case.call(module, *inputs), [module], inputs)


@functools.cache
def traced_unet(is_last):
    return traced_on_meta(replace(UNET, prepare=lambda module: module.to(memory_format=LAYOUTS[is_last])))


@functools.cache
def of_unet():
    """What is found of one that is only read."""
    return profiled()


@pytest.mark.parametrize("level", Level)
def test_units_are_those_of_an_attached_module(level):
    found, _ = of_unet()
    module = UNET.module("cpu")
    attachment = attach(module, Rule(level), Stream(torch.device("cpu")))
    expected = sorted(sum(aligned(one.nbytes) for one in unit.weights) for unit in attachment.units)
    assert sorted(unit.nbytes for unit in found.units[level]) == expected
    assert sum(unit.aside for unit in found.units[level]) == sum(unit.aside for unit in attachment.units)
    detach(module)


@pytest.mark.parametrize("level", Level)
def test_units_are_in_the_order_of_calls_and_have_all_the_work(level):
    found, traced = of_unet()
    for kind in ("convolution", "product", "attention", "touched", "weights", "kernels"):
        done = sum(getattr(unit.work, kind) for unit in found.units[level])
        assert done == pytest.approx(getattr(traced.call.work, kind)), kind
    if level is not Level.WHOLE:
        names = [unit.name.split(".")[1] for unit in found.units[level]]
        assert names[0] in ("conv_in", "time_embedding")
        assert names[-1] == "conv_out"


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_castings_rest_in_the_bytes_that_they_take(name):
    found, _ = of_unet()
    module = UNET.module("cpu")
    apply_casting(module, named_casting(name))
    weights = attach(module, Rule(Level.WHOLE), Stream(torch.device("cpu"))).weights
    small = [one.whole for one in weights if isinstance(getattr(one, "whole", None), CastWeight)]
    scales = sum(4 * one.scale.numel() for one in small if one.scale is not None)
    expected = sum(aligned(one.nbytes) for one in weights) + scales
    assert sum(unit.nbytes for unit in found.castings[name][Level.WHOLE]) == expected
    detach(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", [Level.BLOCK, Level.LEAF])
def test_weights_of_another_dtype_go_through_the_ring(level):
    case = CASES["seascapes U-Net 2 of 16-bfloat16"]
    lying = {name: InFile(torch.float16) for name in state_names(case.module("meta"))}
    found, traced = profiled(case, lying=lying)
    units = found.units[level]
    streamed = max(unit.nbytes for unit in units if not unit.aside)
    depth = 2 + any(unit.modules > 1 for unit in units)
    bound = depth * streamed + sum(unit.nbytes for unit in units if unit.aside)
    assert all(unit.copied == unit.nbytes for unit in units)
    module = UNet2DConditionModel.from_pretrained(SEASCAPES, subfolder="unet", dtype=torch.bfloat16).requires_grad_(
        False
    )
    index = find_weights(SEASCAPES / "unet", "diffusion_pytorch_model")
    in_file = next(iter(index.values())).dtype
    if in_file == torch.bfloat16:
        pytest.skip("the shipped weights are bfloat16")
    attachment = attach(module, Rule(level, Tier.DISK), Stream(torch.device("cpu")), index=index)
    assert attachment.bound == bound
    inputs = case.tensors()
    with torch.no_grad():
        case.call(module, *inputs)
        peak = peak_bytes(lambda: case.call(module, *inputs)) + sum(one.nbytes for one in inputs)
    assert peak <= traced.call.peak + bound
    detach(module)


@pytest.mark.parametrize(
    ("lying", "in_place"),
    [(InFile(torch.float32), True), (InFile(torch.float16), False), (InFile(torch.float32, in_place=False), False)],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_only_what_lies_as_it_works_is_mapped(lying, in_place, is_last):
    module, traced = traced_unet(is_last)
    found = component("network", module, traced=traced, lying=dict.fromkeys(state_names(module), lying))
    mapped = {unit.copied == 0 for unit in found.units[Level.LEAF]}
    assert mapped == ({in_place, False} if is_last else {in_place})  # convolutions have another order


def test_weights_that_stay_in_another_order_are_known_to_be_in_their_file(tmp_path):
    """One that stays is a copy; a block may hold some that are copied and some that are mapped."""
    module = UNet2DConditionModel.from_pretrained(SEASCAPES, subfolder="unet", torch_dtype=torch.bfloat16)
    module.save_pretrained(tmp_path)
    module = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    attachment = attach(module, Rule(Level.BLOCK, Tier.DISK, resident_bytes=10**6), Stream(torch.device("cpu")))
    assert sum(unit.stays for unit in attachment.units) > 1
    module.to(memory_format=torch.channels_last)
    attachment = attachment_of(module)
    lying = weights_in_files(module)
    assert set(lying) == state_names(module)
    found = component("network", meta_copy(module), lying=lying)
    sizes = [attachment.stream._sizes[unit] for unit in attachment.units]
    assert sorted(unit.copied for unit in found.units[Level.BLOCK]) == sorted(one.copied for one in sizes)
    assert any(one.copied and one.window for one in sizes)
    detach(module)


def test_what_is_called_again_is_replayed_with_the_same_peak_and_work(monkeypatch):
    _, replayed = profiled()
    for place in ("tracing", "repeats"):  # of modules, of operators
        monkeypatch.setattr(f"lowtide.prediction.{place}.form_of_call", lambda args, kwargs: None)
    _, followed = profiled()
    assert replayed.call == followed.call
