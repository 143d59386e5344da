"""Attention backends: equal to a reference in double precision, linear in memory, masks and all head sizes."""

import math
import sys
from types import ModuleType

import pytest
import torch
from tests import tiny
from tests.memory_peaks import peak_bytes
from tests.thinned import thinned

from lowtide.machine.accelerators import accelerator
from lowtide.ops import attention as module
from lowtide.ops.attention import BACKENDS, AttentionBackend, OnlineSoftmax, attention, available_backends

HERE = available_backends("cpu")
CHUNK = 2**16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS, CHUNKS = {"cuda": (1024, 4096), "sim": (32, 128)}, {"cuda": 2**20, "sim": 2**15}
"""Of two runs on an accelerator, and the bytes of their chunks; the stand-in computes on the CPU."""


def reference(q, k, v, mask=None, scale=None):
    """Softmax of all scores, in double precision, from its definition."""
    scores = q.double() @ k.double().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1) @ v.double()


def inputs(heads=2, size=16, queries=65, keys=33, batch=2, dtype=torch.float32):
    shapes = [(batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, size)]
    return [(3 * tiny.numbers(shape, seed)).to(dtype) for seed, shape in enumerate(shapes)]


def masks(queries=65, keys=33, heads=2, batch=2):
    some = tiny.numbers((batch, 1, 1, keys), 9) > -0.5
    return {
        "none": None,
        "a boolean for each key": some,
        "causal": torch.ones(queries, keys, dtype=torch.bool).tril(),
        "addends": 2 * tiny.numbers((1, heads, queries, keys), 8),
        "addends for all": tiny.numbers((queries, keys), 7),
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("form", [(1, 512), (2, 7), (3, 64), (8, 40), (2, 1)], ids=str)
@pytest.mark.parametrize("name", HERE)
@torch.no_grad()
def test_equal_to_the_reference(name, form, mask):
    heads, size = form
    q, k, v = inputs(heads, size)
    chosen = masks(heads=heads)[mask]
    expected = reference(q, k, v, chosen)
    for backend in (AttentionBackend(name, CHUNK), AttentionBackend(name, 512), AttentionBackend(name, CHUNK, 1)):
        assert (attention(q, k, v, chosen, backend) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", HERE)
def test_a_scale_of_ones_own(name):
    q, k, v = inputs()
    found = attention(q, k, v, None, AttentionBackend(name, CHUNK), scale=0.1)
    assert (found - reference(q, k, v, scale=0.1)).abs().max() <= 1e-5
    assert (found - reference(q, k, v)).abs().max() > 1e-2, "a control: the scale matters"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HERE)
def test_half_precision_is_as_near_as_the_usual_kernel(name, dtype):
    q, k, v = inputs(dtype=dtype)
    expected = reference(q, k, v)
    usual = (torch.nn.functional.scaled_dot_product_attention(q, k, v) - expected).abs().max()
    found = attention(q, k, v, None, AttentionBackend(name, CHUNK))
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 1.5 * usual


def test_chunks_that_forget_would_be_seen(monkeypatch):
    """Negative control: sums that are not scaled anew when a larger score comes."""
    q, k, v = inputs()
    add = OnlineSoftmax.add

    def forgetful(self, *parts):
        before = self._largest_BNL1
        add(self, *parts)
        self._sum_BNLH = self._sum_BNLH * torch.where(before.isinf(), 1.0, (self._largest_BNL1 - before).exp())

    monkeypatch.setattr(OnlineSoftmax, "add", forgetful)
    assert (attention(q, k, v, None, AttentionBackend("chunked", 512)) - reference(q, k, v)).abs().max() > 1e-2


def test_keys_that_are_masked_out_to_begin_with():
    q, k, v = inputs()
    mask = torch.zeros(65, 33, dtype=torch.bool)
    mask[:, -1] = True
    found = attention(q, k, v, mask, AttentionBackend("chunked", 512))
    assert torch.allclose(found, v[:, :, -1:].expand_as(found), atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_a_query_that_may_attend_to_nothing_gets_zeros(name):
    q, k, v = inputs()
    mask = torch.ones(65, 33, dtype=torch.bool)
    mask[3] = False
    found = attention(q, k, v, mask, AttentionBackend(name, 512))
    assert torch.equal(found[:, :, 3], torch.zeros_like(found[:, :, 3]))
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["sdpa", "chunked"])
def test_gradients_are_pytorchs(name):
    q, k, v = (one.requires_grad_() for one in inputs())
    attention(q, k, v, None, AttentionBackend(name, 512)).sum().backward()
    twins = [one.detach().clone().requires_grad_() for one in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*twins).sum().backward()
    assert all(torch.equal(one.grad, twin.grad) for one, twin in zip((q, k, v), twins, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_memory_grows_with_the_tokens_and_not_with_their_square(name):
    peaks = []
    for tokens in (2048, 8192) if name == "sdpa" else (512, 2048):  # of few tokens PyTorch may compute it
        q, k, v = inputs(2, 32, tokens, tokens, batch=1)
        peaks.append(peak_bytes(lambda q=q, k=k, v=v: attention(q, k, v, None, AttentionBackend(name, CHUNK))))
    growth = peaks[1] / peaks[0]
    assert growth > 14 if name == "math" else growth <= 4.1


def test_where_pytorch_has_no_kernel_chunks_take_over(monkeypatch):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 0)
    q, k, v = inputs(2, 32, 1024, 1024, batch=1)
    peak = peak_bytes(lambda: attention(q, k, v, None, AttentionBackend("sdpa", CHUNK)))
    assert peak < 1024 * 1024 * 4
    assert (attention(q, k, v, None, AttentionBackend("sdpa", CHUNK)) - reference(q, k, v)).abs().max() <= 1e-5


def test_a_kernel_that_refuses_is_replaced_with_a_warning(monkeypatch):
    q, k, v = inputs(1, 512)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: -1)
    with pytest.warns(UserWarning, match="'flash' does not take a head size of 512 .*without a mask: 'chunked'"):
        found = attention(q, k, v, None, AttentionBackend("flash"))
    assert (found - reference(q, k, v)).abs().max() <= 1e-5


def test_the_default_is_pytorchs_own_bit_for_bit():
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_a_backend_takes_effect(monkeypatch):
    """Each name leads to its own way of computing."""
    q, k, v = inputs()
    seen = []
    for name, compute in module._COMPUTE.items():
        monkeypatch.setitem(module._COMPUTE, name, lambda *a, n=name, c=compute: seen.append(n) or c(*a))
    for name in HERE:
        attention(q, k, v, None, AttentionBackend(name))
    assert seen == list(HERE)


@pytest.mark.parametrize("mask", masks())
def test_xformers_gets_what_it_wants(monkeypatch, mask):
    """A stand-in with the library's layout: tokens before heads, an addend of the whole size, an operator."""
    given = {}

    def memory_efficient_attention(q, k, v, attn_bias=None, op=None, scale=None):
        given.update(shape=q.shape, bias=attn_bias, op=op)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return reference(q, k, v, attn_bias, scale).float().transpose(1, 2)

    stand_in, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    stand_in.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", stand_in)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = inputs()
    chosen = masks()[mask]
    found = attention(q, k, v, chosen, AttentionBackend("xformers", op="an operator"))
    assert (found - reference(q, k, v, chosen)).abs().max() <= 1e-5
    assert given["shape"] == (2, 65, 2, 16)
    assert given["op"] == "an operator"
    assert given["bias"] is None or (given["bias"].shape == (2, 2, 65, 33) and given["bias"].dtype == torch.float32)


def test_what_is_available():
    assert HERE == ("sdpa", "flash", "chunked", "math")
    assert set(HERE) | {"efficient", "cudnn"} <= set(BACKENDS)
    assert {"flash", "efficient", "cudnn"} <= set(available_backends("cuda"))
    assert available_backends("mps") == available_backends("xpu") == ("sdpa", "chunked", "math")


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    thinned(["sdpa", "flash", "efficient", "cudnn", "chunked"], [(1, 512), (2, 7), (8, 40), (4, 64)], DTYPES),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The attention backend")
def test_on_an_accelerator(name, form, dtype, device):
    """Right and linear for every head size, also those that a kernel refuses, or that has none."""
    peaks, kind, backend = [], accelerator(device), AttentionBackend(name, CHUNKS[device.type])
    for tokens in TOKENS[device.type]:
        q, k, v = (one.to(device) for one in inputs(*form, tokens, tokens, batch=1, dtype=dtype))
        found = attention(q, k, v, None, backend)
        assert (found - reference(q, k, v)).abs().max() <= (1e-4 if dtype == torch.float32 else 3e-2)
        kind.begin_peaks(device)
        before = kind.allocated(device)
        attention(q, k, v, None, backend)
        peaks.append(kind.peaks(device)[0] - before)
    assert peaks[1] <= 5 * peaks[0]
