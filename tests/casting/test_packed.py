"""Packed weights: the same results up to rounding, and every number still there, whatever is done to a module."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from tests.fitting import fits
from tests.memory_peaks import peak_bytes
from torch import nn

import lowtide
from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.cast_weight import small_of
from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.casting.packed_weight import PackedWeight
from lowtide.memory import Tier, apply_residency, detach
from lowtide.models.unet import UNet2DConditionModel
from lowtide.ops.packed import has_packed
from lowtide.planning.plan import UP_TO_ROUNDING

PACKED = NAMED_CASTINGS["packed"]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the spread of results, on average at most."""


class Small(nn.Module):
    """Layers that are packed, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 40, 3, padding=1)
        self.down = nn.Conv2d(40, 24, 3, stride=2, padding=1, bias=False)
        self.apart = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.around = nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular")
        self.norm = nn.LayerNorm(24)
        self.wide = nn.Linear(24, 56)
        self.narrow = nn.Linear(56, 24, bias=False)
        self.tied = nn.Linear(24, 24, bias=False)
        self.too = nn.Linear(24, 24, bias=False)
        self.too.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` to `[B, H W / 4, 24]`."""
        x = self.around(self.apart(self.down(self.first(x))))
        rows = self.norm(x.flatten(2).transpose(1, 2))
        return self.too(self.tied(self.narrow(self.wide(rows).tanh())))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def is_close(result, expected):
    return (result - expected).float().square().mean().sqrt() <= ROUNDING[result.dtype] * expected.float().std()


def packed_of(module):
    return {name: small for name, weight in module.named_parameters() if (small := small_of(weight)) is not None}


def test_results_are_the_same_up_to_rounding(module, x):
    for dtype in filter(has_packed, ROUNDING):
        plain = copy.deepcopy(module).to(dtype)
        packed = copy.deepcopy(plain)
        apply_casting(packed, PACKED)
        assert set(packed_of(packed)) == {"first.weight", "down.weight", "wide.weight", "narrow.weight"}
        for size in (12, 20, 12):  # packed for the first one
            some = torch.nn.functional.interpolate(x, size=size).to(dtype)
            result = packed(some)
            assert is_close(result, plain(some))
            assert torch.equal(packed(some), result)
        assert not is_close(packed(some), plain(some * 1.1)), "and not whatever is computed"


def test_a_weight_counts(module, x):
    other = copy.deepcopy(module)
    other.down.weight[0, 0, 0, 0] += 0.01
    apply_casting(other, PACKED)
    assert not is_close(other(x), module(x))


def test_all_numbers_are_there_and_come_back(module, x):
    expected, before = module(x), {name: value.clone() for name, value in module.state_dict().items()}
    apply_casting(module, PACKED)
    for _ in range(2):  # before it is packed, and after
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), expected)
            assert not packed_of(other)
        module(x)
    assert all(weight.packed is not None for weight in packed_of(module).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_casting(module)
    assert torch.equal(module(x), expected)
    assert not packed_of(module)


@pytest.mark.parametrize("was_called", [False, True])
def test_what_is_done_to_a_module_is_done_to_packed_weights(module, x, was_called):
    plain = copy.deepcopy(module)
    apply_casting(module, PACKED)
    if was_called:
        module(x)
    changes = {
        "another dtype and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
        "another order": lambda m: m.to(memory_format=torch.channels_last),
        "loaded": lambda m: m.load_state_dict({name: 0.5 * value for name, value in plain.state_dict().items()}),
    }
    for name, change in changes.items():
        changed = copy.deepcopy(plain)
        change(changed)
        change(module)
        assert is_close(module(x), changed(x)), name
        assert packed_of(module)
        module.load_state_dict(plain.state_dict())
        module.to(memory_format=torch.contiguous_format)


def test_gradients_are_taken_as_before(module, x):
    apply_casting(module, PACKED)
    module(x)
    some = x.clone().requires_grad_()
    module(some).sum().backward()
    assert some.grad is not None


def test_several_threads_begin_together(module, x):
    apply_casting(module, PACKED)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(module(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.DISK])
def test_under_a_rule_weights_work_as_they_are(module, x, rest):
    """A rule that comes to packed weights, and one that goes: results are right, and all can be undone."""
    expected = module(x)
    apply_casting(module, PACKED)
    packed = module(x)
    apply_residency(module, rest=rest, level="leaf", device="cpu")
    assert is_close(module(x), expected)
    detach(module)
    assert torch.equal(module(x), packed) or torch.equal(module(x), expected)
    remove_casting(module)
    assert torch.equal(module(x), expected)


def test_weights_of_a_file_stay_there_and_are_packed_beside_it(tmp_path):
    torch.manual_seed(0)
    made = UNet2DConditionModel.from_config({"cross_attention_dim": 16, "norm_num_groups": 4, **fits.UNET}).eval()
    made.save_pretrained(tmp_path)
    given = torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 16)
    for dtype in filter(has_packed, ROUNDING):
        plain = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=dtype)
        module = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=dtype, casting="packed")
        some = given[0].to(dtype), given[1], given[2].to(dtype)
        assert is_close(module(*some).sample, plain(*some).sample)
        weights = packed_of(module).values()
        assert all(weight.rest.tier is Tier.DISK and weight.packed is not None for weight in weights)
        module.save_pretrained(tmp_path / "again")
        again = UNet2DConditionModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
        assert torch.equal(again(*some).sample, plain(*some).sample)


def test_a_packed_module_takes_no_more_memory_beside_its_weights(module, x):
    with torch.no_grad():
        before = peak_bytes(lambda: module(x))
        apply_casting(module, PACKED)
        module(x)
        assert peak_bytes(lambda: module(x)) <= before


def test_another_device_has_no_such_numbers(module):
    apply_casting(module, PACKED)
    with pytest.raises(ValueError, match=r"first.weight is packed for a CPU, and cannot go to meta before"):
        module.to("meta")


FAST = replace(fits.RATES, kernel=1e-9, touched=1e13, packed_convolution=1e12, packed_product=1e12, packing=1e13)


@pytest.mark.parametrize("packing", [1e13, 1.0])
def test_a_plan_packs_where_that_pays(tmp_path, monkeypatch, packing):
    rates = replace(FAST, packing=packing)
    monkeypatch.setattr("lowtide.fitting.prepare._rates", lambda *_: rates)
    pipe = fits.small(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 3}

    def made():
        return pipe("a boat", generator=torch.Generator().manual_seed(0), output_type="np", **size).images

    expected = made()
    plain = pipe.fit(ram="8GB", device="cpu", **size)
    said = any("packed weights would save" in reason for reason in plain.why)
    plan = pipe.fit(ram="8GB", device="cpu", allow=("packed",), **size)
    is_packed = plan.components["unet"].casting == "packed"
    assert is_packed is said is (packing > 1)
    assert torch.equal(torch.as_tensor(made()), torch.as_tensor(expected)) is not is_packed
    assert abs(made() - expected).max() < 1e-4
    if is_packed:
        assert plan.exactness == UP_TO_ROUNDING
        assert "resident, packed" in str(plan)
        assert plan.seconds < plain.seconds
        assert any(isinstance(small_of(weight), PackedWeight) for weight in pipe.unet.parameters())
    pipe.unfit()
    assert torch.equal(torch.as_tensor(made()), torch.as_tensor(expected))
    assert not lowtide.plan_of(pipe)
