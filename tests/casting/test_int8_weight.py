"""Layers that multiply in int8: near those that dequantize, the same whatever rule moves the bytes, and undone."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from tests.casting.test_packed import Small
from tests.fitting import fits

import lowtide
from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.cast_weight import small_of
from lowtide.casting.casting import NAMED_CASTINGS, Casting
from lowtide.casting.int8_weight import Int8Weight
from lowtide.memory import Tier, apply_residency, detach
from lowtide.models.unet import UNet2DConditionModel
from lowtide.ops.int8_products import has_int8_products

DYNAMIC, WEIGHTS_ALONE = (replace(NAMED_CASTINGS[name], skip_patterns=()) for name in ("int8_dynamic", "int8"))
NEAR = 0.03
"""Of the spread of results, on average at most: of several layers."""
needs_instructions = pytest.mark.skipif(not has_int8_products(), reason="this processor has no instructions for it")


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def cast_module(module, casting=DYNAMIC):
    changed = copy.deepcopy(module)
    apply_casting(changed, casting)
    return changed


def multiplied(module):
    smalls = {name: small_of(weight) for name, weight in module.named_parameters()}
    return {name: small for name, small in smalls.items() if isinstance(small, Int8Weight)}


def error(result, expected):
    return ((result - expected).float().square().mean().sqrt() / expected.float().std()).item()


@needs_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_near(module, x, dtype):
    plain, some = module.to(dtype), x.to(dtype)
    changed = cast_module(plain)
    assert set(multiplied(changed)) == {"first.weight", "down.weight", "wide.weight", "narrow.weight"}
    for size in (12, 20, 12):  # packed for the first one
        some = torch.nn.functional.interpolate(x, size=size).to(dtype)
        result = changed(some)
        assert 0 < error(result, plain(some)) < NEAR
        assert torch.equal(changed(some), result)
    assert error(result, plain(1.2 * some)) > NEAR, "and not whatever is computed"
    assert all(small.packed is not None for small in multiplied(changed).values())


def test_without_instructions_it_is_dequantized(module, x, monkeypatch):
    changed, expected = cast_module(module), cast_module(module, WEIGHTS_ALONE)(x)
    monkeypatch.setattr("lowtide.casting.int8_weight.has_int8_products", lambda: False)
    assert torch.equal(changed(x), expected)


def test_what_rests_is_what_int8_has(module, x):
    changed, expected = cast_module(module), cast_module(module, WEIGHTS_ALONE)
    for _ in range(2):  # before it is packed, and after
        for (name, value), other in zip(changed.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
        for again in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
            assert torch.equal(again(x), expected(x)) or error(again(x), expected(x)) < NEAR
        changed(x)


@needs_instructions
@pytest.mark.parametrize("rest", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("was_called", [False, True])
def test_under_every_rule_bits_are_equal(module, x, rest, was_called):
    changed = cast_module(module)
    expected = changed(x) if was_called else cast_module(module)(x)
    apply_residency(changed, rest=rest, level="leaf", device="cpu")
    assert torch.equal(changed(x), expected)
    assert all(small.packed is None for small in multiplied(changed).values())
    detach(changed)
    assert torch.equal(changed(x), expected)


def test_what_is_done_to_a_module_is_done_to_its_weights(module, x):
    changed = cast_module(module)
    changed(x)
    for name, change in {
        "another dtype": lambda m: m.to(torch.bfloat16),
        "and back": lambda m: m.to(torch.float32),
        "another order": lambda m: m.to(memory_format=torch.channels_last),
        "loaded": lambda m: m.load_state_dict({name: 0.5 * value for name, value in module.state_dict().items()}),
    }.items():
        change(changed)
        plain = copy.deepcopy(module)
        change(plain)
        some = x.to(next(plain.parameters()).dtype)
        assert error(changed(some), plain(some)) < NEAR, name
        assert len(multiplied(changed)) == 4


def test_several_threads_begin_together(module, x):
    changed, results = cast_module(module), []
    threads = [threading.Thread(target=lambda: results.append(changed(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_on_another_device_it_is_dequantized(module, x, device):
    changed, expected = cast_module(module), cast_module(module, WEIGHTS_ALONE)
    changed(x)
    assert torch.equal(changed.to(device)(x.to(device)).cpu(), expected.to(device)(x.to(device)).cpu())


@torch.no_grad()
def test_checkpoints(tmp_path):
    torch.manual_seed(0)
    made = UNet2DConditionModel.from_config({"cross_attention_dim": 16, "norm_num_groups": 4, **fits.UNET}).eval()
    made.save_pretrained(tmp_path / "plain")
    given = torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, 16)
    cast = UNet2DConditionModel.from_pretrained(tmp_path / "plain", casting="int8_dynamic")
    expected = cast(*given).sample
    assert 0 < error(expected, made(*given).sample) < 0.2
    other = UNet2DConditionModel.from_pretrained(tmp_path / "plain", casting="int8_dynamic")
    other(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_casting(other)
    assert torch.equal(other(*given).sample, made(*given).sample)
    cast.save_pretrained(tmp_path / "cast")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "cast", casting="int8_dynamic")
    assert torch.equal(again(*given).sample, expected)
    assert len(multiplied(again)) == len(multiplied(cast)) > 10
    alone = UNet2DConditionModel.from_pretrained(tmp_path / "cast")
    assert not multiplied(alone)


def test_a_casting_is_exchanged_for_another(module, x):
    changed = cast_module(module)
    changed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_casting(changed, WEIGHTS_ALONE)
        assert not multiplied(changed)
        apply_casting(changed, DYNAMIC)
    assert len(multiplied(changed)) == 4
    before = [small_of(weight) for weight in changed.parameters()]
    apply_casting(changed, DYNAMIC)
    assert [small_of(weight) for weight in changed.parameters()] == before


def test_other_storages_are_refused():
    with pytest.raises(ValueError, match="int8_matmul with storage='float8_e4m3fn' is not possible"):
        Casting(int8_matmul=True)


FAST = replace(fits.RATES, kernel=1e-9, touched=1e13, int8_convolution=1e12, int8_product=1e12, packing=1e13)


@pytest.mark.parametrize("is_faster", [True, False])
def test_a_plan_multiplies_in_int8_what_is_called_in_steps(tmp_path, monkeypatch, is_faster):
    rates = FAST if is_faster else replace(FAST, int8_convolution=0.0, int8_product=0.0)
    monkeypatch.setattr("lowtide.fitting.prepare._rates", lambda *_: rates)
    pipe = fits.load(fits.checkpoint(tmp_path, "pictures"), "pictures")
    size = {"height": 32, "width": 32, "num_inference_steps": 3}

    def made():
        return pipe("a boat", generator=torch.Generator().manual_seed(0), output_type="np", **size).images

    expected = made()
    plain = pipe.fit(ram="8GB", device="cpu", **size)
    plan = pipe.fit(ram="8GB", device="cpu", allow=("int8",), **size)
    assert {part.casting for part in plan.components.values()} == ({None, "int8_dynamic"} if is_faster else {None})
    if is_faster:
        assert plan.components["unet"].casting == "int8_dynamic"
        assert plan.exactness == "changed: int8_dynamic"
        assert "resident and multiplied in int8" in str(plan)
        assert plan.seconds < plain.seconds
        assert len(multiplied(pipe.unet)) > 10
        assert lowtide.Plan.from_json(plan.to_json()) == plan
    made()
    pipe.unfit()
    assert torch.equal(torch.as_tensor(made()), torch.as_tensor(expected))
    assert not lowtide.plan_of(pipe)
