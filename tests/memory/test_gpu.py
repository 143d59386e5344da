"""The engine on a GPU, where there is one: `test_device_stream` and its siblings say the same of a stand-in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import Casting
from lowtide.memory import detach
from lowtide.memory.attach import attach
from lowtide.memory.presets import apply_residency, stream_for
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.ops.quantization import FP8_CAPABILITY


def blocks(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(5)]
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*block), nn.LayerNorm(16)).eval().to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize("level", ["block", "leaf", "whole"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_equal_on_a_gpu(dtype: torch.dtype, rest: str, level: str, share: float) -> None:
    module, x = blocks(dtype), torch.randn(3, 16, dtype=dtype, device="cuda")
    with torch.no_grad():
        plain = module.to("cuda")(x)
        module.to("cpu")
        nbytes = sum(p.numel() * p.itemsize for p in module.parameters())
        attachment = apply_residency(module, int(share * nbytes), rest=rest, level=level, device="cuda")
        for _ in range(4):
            assert torch.equal(module(x), plain)
    assert attachment.stream.ledger.peak <= attachment.bound
    assert next(module.parameters()).device.type == "cuda", "the placeholders say where the module computes"
    assert all(tensor.device.type == "cpu" for name, tensor in module.state_dict().items() if not share)
    detach(module)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(module.to("cuda")(x), plain)


@pytest.mark.gpu
def test_inputs_come_along_and_nothing_is_allocated_in_later_steps() -> None:
    module = blocks()
    rule = Rule(Level.BLOCK, Tier.HOST)
    attach(module, rule, stream_for(torch.device("cuda", 0), rule))
    x = torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(2):
            out = module(x)
        segments = torch.cuda.memory_stats()["segment.all.allocated"]
        for _ in range(5):
            module(x)
    assert out.device.type == "cuda"
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


@pytest.mark.gpu
@pytest.mark.parametrize("casting", [Casting("float8_e4m3fn"), Casting("float8_e4m3fn", scaled=True), Casting("int8")])
@pytest.mark.parametrize("level", [None, "block", "leaf", "whole"])
def test_cast_weights_on_a_gpu(casting: Casting, level: str | None) -> None:
    """The same numbers as on the CPU, resident and under every rule; moving does not undo the casting."""
    module, x = blocks(torch.bfloat16), torch.randn(3, 16, dtype=torch.bfloat16, device="cuda")
    apply_casting(module, casting)
    numbers = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        plain = blocks(torch.bfloat16)
        plain.load_state_dict(numbers)
        expected = plain.to("cuda")(x)
        if level is None:
            module.to("cuda")
        else:
            apply_residency(module, level=level, device="cuda")
        for _ in range(3):
            assert torch.equal(module(x), expected)
        detach(module)
        module.to("cuda")
        assert torch.equal(module(x), expected)
        module.to("cpu")
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in module.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY, reason="no fp8 units"
)
def test_products_in_fp8_on_a_gpu() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 640).to(torch.bfloat16)
    x = torch.randn(77, 320, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        module = nn.Sequential(layer)
        apply_casting(module, Casting("float8_e4m3fn", scaled=True, fp8_matmul=True))
        on_cpu = module(x).double()
        on_gpu = module.to("cuda")(x.to("cuda")).double().cpu()
    assert (on_gpu - exact).norm() / exact.norm() < 0.045
    assert (on_gpu - on_cpu).norm() / exact.norm() < 0.01
