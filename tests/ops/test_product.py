"""Products by the library that is fastest here: the same up to rounding, and the memory that they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.memory_peaks import peak_bytes

from lowtide.models.layers import Linear
from lowtide.ops import product
from lowtide.ops.packed import pack_product, packed_product
from lowtide.prediction.component import trace_call

SHAPES = [(8, 16, 24), (77, 768, 320), (512, 320, 1280), (3, 100, 7), (64, 4096, 32), (4096, 4096, 16)]


@pytest.fixture(params=[True, False], ids=["onednn", "pytorch"])
def by_onednn(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(product, "BY_ONEDNN", request.param)
    return request.param


def layer(rows, inner, outer):
    torch.manual_seed(0)
    return Linear(inner, outer).requires_grad_(False), torch.randn(2, rows, inner)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(by_onednn, shape):
    linear, x = layer(*shape)
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert (linear(x) - expected).abs().max() < 1e-4
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias)) or by_onednn
    if by_onednn:
        packed = packed_product(x, pack_product(linear.weight, 2 * shape[0]), linear.bias)
        assert (linear(x) - packed).abs().max() < 1e-4


@pytest.mark.skipif(torch.get_num_threads() > 1, reason="kernels were measured with one thread")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory(by_onednn, shape):
    linear, x = layer(*shape)
    with torch.no_grad():
        measured = peak_bytes(lambda: linear(x)) + x.nbytes
        on_meta = x.to("meta")
        call = trace_call(lambda: linear.to("meta")(on_meta), (linear.to("meta"),), (on_meta,))
    assert measured <= call.peak <= measured + (2**21 if shape[1] >= 4096 else 2**17)


def test_what_pytorch_alone_does(by_onednn):
    linear, x = layer(8, 16, 24)
    assert torch.equal(linear(x.bfloat16().float()), linear(x.bfloat16().float()))
    halves = Linear(16, 24, dtype=torch.bfloat16).requires_grad_(False)
    assert torch.equal(halves(x.bfloat16()), F.linear(x.bfloat16(), halves.weight, halves.bias))
    across = x.transpose(0, 1)
    assert torch.equal(linear(across), F.linear(across, linear.weight, linear.bias))
    some = x.clone().requires_grad_()
    linear(some).sum().backward()
    assert some.grad is not None
