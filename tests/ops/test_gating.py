"""A gate applied in pieces: the bits of one that is applied at once, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from tests.memory_peaks import peak_bytes

from lowtide.ops import gating
from lowtide.ops.gating import gated_gelu


@pytest.mark.parametrize("shape", [(2, 50, 36), (1, 7, 8), (3, 0, 8), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_equal(shape, dtype, monkeypatch):
    monkeypatch.setattr(gating, "AT_ONCE", 100)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    value, gate = wide.chunk(2, dim=-1)
    assert torch.equal(gated_gelu(wide), value * F.gelu(gate))
    turned = wide.transpose(0, 1)
    assert torch.equal(gated_gelu(turned), gated_gelu(turned.contiguous()))


def test_it_takes_little_more_than_its_result():
    wide = torch.randn(4096, 2048)
    result = 4096 * 1024 * 4
    assert peak_bytes(lambda: gated_gelu(wide)) <= result + 2 * 4 * gating.AT_ONCE


def test_gradients():
    wide = torch.randn(5, 8, requires_grad=True)
    twin = wide.detach().clone().requires_grad_()
    gated_gelu(wide).sum().backward()
    value, gate = twin.chunk(2, dim=-1)
    (value * F.gelu(gate)).sum().backward()
    assert torch.equal(wide.grad, twin.grad)
