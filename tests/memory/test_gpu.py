"""The engine on an accelerator, whichever it is; `test_device_stream` looks into the stand-in too."""

from __future__ import annotations

import pytest
import torch
from tests.thinned import thinned
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import Casting
from lowtide.machine.accelerators import accelerator
from lowtide.memory import detach
from lowtide.memory.attach import attach
from lowtide.memory.presets import apply_residency, stream_for
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.ops.quantization import FP8_CAPABILITY

LEVELS = ("block", "leaf", "whole")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


CASTINGS = [Casting("float8_e4m3fn"), Casting("float8_e4m3fn", scaled=True), Casting("int8"), Casting("int4")]


def blocks(dtype: torch.dtype = torch.float32, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    inner = width * 3 // 2
    block = [nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(5)]
    return nn.Sequential(nn.Linear(width, width), nn.Sequential(*block), nn.LayerNorm(width)).eval().to(dtype)


@pytest.mark.parametrize(("level", "rest", "share", "dtype"), thinned(LEVELS, ["host", "disk"], [0, 0.5], DTYPES))
def test_equal(device: torch.device, dtype: torch.dtype, rest: str, level: str, share: float) -> None:
    module, x = blocks(dtype), torch.randn(3, 16, dtype=dtype, device=device)
    with torch.no_grad():
        plain = module.to(device)(x)
        module.to("cpu")
        nbytes = sum(p.numel() * p.itemsize for p in module.parameters())
        attachment = apply_residency(module, int(share * nbytes), rest=rest, level=level, device=device)
        for _ in range(4):
            assert torch.equal(module(x), plain)
    assert attachment.stream.ledger.peak <= attachment.bound
    assert next(module.parameters()).device == device, "the placeholders say where the module computes"
    assert all(tensor.device.type == "cpu" for name, tensor in module.state_dict().items() if not share)
    detach(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(module.to(device)(x), plain)


def held(device: torch.device) -> tuple[int, ...]:
    """The most that the allocator held; of CUDA's also how often it asked the driver for more."""
    segments = (torch.cuda.memory_stats(device)["segment.all.allocated"],) if device.type == "cuda" else ()
    kind = accelerator(device)
    assert kind is not None
    return kind.peaks(device)[1], *segments


def test_inputs_come_along_and_no_more_is_held_in_later_steps(device: torch.device) -> None:
    module = blocks()
    rule = Rule(Level.BLOCK, Tier.HOST)
    attach(module, rule, stream_for(device, rule))
    x = torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(2):
            out = module(x)
        before = held(device)
        for _ in range(5):
            module(x)
    assert out.device == device
    assert held(device) == before


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("level", [None, "block", "leaf", "whole"])
def test_cast_weights(device: torch.device, casting: Casting, level: str | None) -> None:
    """The same numbers as on the CPU, resident and under every rule; moving does not undo the casting."""
    module, x = blocks(torch.bfloat16, 64), torch.randn(3, 64, dtype=torch.bfloat16, device=device)
    apply_casting(module, casting)
    numbers = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        plain = blocks(torch.bfloat16, 64)
        plain.load_state_dict(numbers)
        expected = plain.to(device)(x)
        if level is None:
            module.to(device)
        else:
            apply_residency(module, level=level, device=device)
        for _ in range(3):
            assert torch.equal(module(x), expected)
        detach(module)
        module.to(device)
        assert torch.equal(module(x), expected)
        module.to("cpu")
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in module.state_dict().items())


def test_products_in_fp8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        pytest.skip("no fp8 units")
    torch.manual_seed(0)
    layer = nn.Linear(320, 640).to(torch.bfloat16)
    x = torch.randn(77, 320, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        module = nn.Sequential(layer)
        apply_casting(module, Casting("float8_e4m3fn", scaled=True, fp8_matmul=True))
        on_cpu = module(x).double()
        on_device = module.to(device)(x.to(device)).double().cpu()
    assert (on_device - exact).norm() / exact.norm() < 0.045
    assert (on_device - on_cpu).norm() / exact.norm() < 0.01
