"""Attention by products: PyTorch's results up to rounding, and the same memory as on meta."""

import pytest
import torch
import torch.nn.functional as F
from tests.memory_peaks import peak_bytes

from lowtide.ops import attention as attention_module
from lowtide.ops import product_attention as module
from lowtide.ops.attention import AttentionBackend, attention
from lowtide.ops.meta_device import standing_for
from lowtide.ops.product_attention import is_by_products, product_attention

SHAPES = [(2, 3, 70, 64, 8), (1, 2, 200, 96, 40), (2, 1, 64, 64, 16)]


@pytest.fixture(autouse=True)
def few_scores(monkeypatch):
    monkeypatch.setattr(module, "SCORES", 32 * 64)
    monkeypatch.setattr(module, "MANY_SCORES", 64 * 64)
    monkeypatch.setattr(module, "LEAST_ROWS", 16)
    monkeypatch.setattr(module, "BY_ONEDNN", True)


def some(batch, heads, queries, keys, width):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, width) for length in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results_are_those_of_pytorch_up_to_rounding(shape, scale):
    q, k, v = some(*shape)
    assert is_by_products(q, k, v)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    result = product_attention(q, k, v, scale)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 1e-5
    assert (product_attention(1.001 * q, k, v, scale) - expected).abs().max() > 1e-5, "the test can fail"
    by_parts = attention(q, k, v, backend=AttentionBackend(heads_at_once=1), scale=scale)
    assert torch.equal(by_parts, result)
    assert torch.equal(attention(q, k, v, scale=scale), result)
    laid_out = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(product_attention(*laid_out, scale), result)


def test_large_scores_do_not_overflow():
    q, k, v = some(1, 1, 64, 64, 16)
    assert product_attention(1e4 * q, k, v).isfinite().all()


def test_what_pytorch_computes(monkeypatch):
    q, k, v = some(*SHAPES[0])
    monkeypatch.setattr(attention_module, "product_attention", None)  # not called
    attention(q, k, v, mask=torch.ones(70, 64, dtype=torch.bool))
    attention(q, k, v, causal=True)
    attention(q[:, :, :8], k, v)
    attention(q.requires_grad_(), k, v)
    attention(q.detach().bfloat16(), k.bfloat16(), v.bfloat16())
    monkeypatch.setattr(module, "BY_ONEDNN", False)
    attention(q.detach(), k, v)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_as_on_meta(shape):
    inputs = some(*shape)
    room: list[int] = []

    class Meta(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and func is torch.Tensor.new_empty:
                room.append(result.nbytes)
            return result

    with standing_for("cpu"), Meta():
        made = product_attention(*(x.to("meta") for x in inputs))
    measured = peak_bytes(lambda: product_attention(*inputs))
    assert 0.5 * measured < made.nbytes + sum(room)
    assert measured <= made.nbytes + sum(room)
