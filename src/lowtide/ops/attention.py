"""Scaled dot-product attention on tensors laid out as `B N L H` (batch, heads, tokens, head size), by several backends.

All but "math" take memory that grows with the number of tokens and not with its square.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from lowtide.ops.meta_device import device_type
from lowtide.ops.modes import is_traced, take_gradients
from lowtide.ops.product_attention import is_by_products, product_attention

CHUNK_BYTES = 64 * 2**20
LEAST_SIDE = 16
"""Queries and keys of a chunk, at least: smaller ones only cost time."""
ALIGNED = 8
"""Numbers of a row that CUDA's kernels load at once: heads and masks of other sizes are filled up."""
aten = torch.ops.aten
_KERNELS_OF = {"cuda": ("flash", "efficient", "cudnn"), "cpu": ("flash",), "meta": ("flash",)}
"""PyTorch's kernels that can be called alone, by the type of device."""
_TOLD = ("cpu", "cuda", "xpu", "meta")
"""Types of device of which PyTorch tells which kernel it would take: `_fused_sdp_choice` raises an error on others."""


@dataclass(frozen=True)
class AttentionBackend:
    """How attention is computed.

    `name`: "sdpa" (the fastest of PyTorch's kernels that takes the input, else "chunked"), one kernel alone ("flash",
    "efficient", "cudnn", or "math", which holds the whole matrix of scores), "xformers", or "chunked": exact, in parts
    of at most `chunk_bytes` of scores. `heads_at_once` computes so many heads of one picture at a time. `op` is the
    operator that "xformers" shall use.
    """

    name: str = "sdpa"
    chunk_bytes: int = CHUNK_BYTES
    heads_at_once: int | None = None
    op: Any = None


DEFAULT = AttentionBackend()


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The names of the backends that a device has."""
    kind = torch.device(device).type
    with_xformers = kind == "cuda" and importlib.util.find_spec("xformers") is not None
    return ("sdpa", *_KERNELS_OF.get(kind, ()), *(["xformers"] if with_xformers else []), "chunked", "math")


@dataclass(frozen=True)
class Inputs:
    """What attention is computed of: q `[B, N, L, H]`, k and v `[B, N, S, H]`, a mask that fits `[B, N, L, S]`.

    `causal` is in place of a mask: each query attends to the keys up to its own.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    causal: bool = False

    def with_mask(self) -> Inputs:
        """The same with a mask in place of `causal`."""
        if not self.causal:
            return self
        shape = self.q.shape[-2], self.k.shape[-2]
        mask = torch.ones(shape, dtype=torch.bool, device=self.q.device).tril_()
        return replace(self, mask=mask, causal=False)

    @property
    def whole_mask(self) -> torch.Tensor | None:
        """A view of the mask as `[B, N, L, S]`."""
        return None if self.mask is None else self.mask.expand(*self.q.shape[:-1], self.k.shape[-2])

    @property
    def need_gradients(self) -> bool:
        """Whether a backward pass may come."""
        return take_gradients(self.q, self.k, self.v)

    def output(self) -> torch.Tensor:
        """Room for the result."""
        return self.q.new_empty((*self.q.shape[:-1], self.v.shape[-1]))

    def some_heads(self, part: tuple[slice, slice]) -> Inputs:
        """Some pictures and heads."""
        mask = self.whole_mask
        return Inputs(
            self.q[part], self.k[part], self.v[part], None if mask is None else mask[part], self.scale, self.causal
        )


def attention(
    q_BNLH: torch.Tensor,
    k_BNSH: torch.Tensor,
    v_BNSH: torch.Tensor,
    mask: torch.Tensor | None = None,
    backend: AttentionBackend = DEFAULT,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attend from `L` query tokens to `S` key tokens: softmax(scale · q kᵀ + mask) v, `scale` 1/√H unless given.

    Shapes: q `[B, N, L, H]`, k and v `[B, N, S, H]`, mask broadcastable to `[B, N, L, S]` (boolean: True attends;
    floating: added to the scores). With `causal`, in place of a mask, each token attends to itself and those before it.
    Returns `[B, N, L, H]` in the dtype of q. Source: Vaswani et al. 2017, eq. 1.
    """
    inputs = Inputs(q_BNLH, k_BNSH, v_BNSH, mask, scale, causal)
    if backend.name != "sdpa":
        inputs = inputs.with_mask()
    compute = _COMPUTE[backend.name]
    if inputs.need_gradients and backend.name in ("sdpa", "chunked"):
        return _by_pytorch(inputs)  # chunks are for inference
    batch, heads = q_BNLH.shape[:2]
    if backend.heads_at_once is None or (batch == 1 and backend.heads_at_once >= heads):
        return compute(inputs, backend)
    out = inputs.output()
    for picture in range(batch):
        for head in range(0, heads, backend.heads_at_once):
            part = slice(picture, picture + 1), slice(head, head + backend.heads_at_once)
            out[part] = compute(inputs.some_heads(part), backend)
    return out


def _sdpa(inputs: Inputs, backend: AttentionBackend) -> torch.Tensor:
    """PyTorch chooses, where our products are not faster.

    But where it would fall back to the matrix of scores, and that is large, chunks take over.
    """
    is_plain = inputs.mask is None and not inputs.causal and not inputs.need_gradients
    if is_plain and is_by_products(inputs.q, inputs.k, inputs.v):
        return product_attention(inputs.q, inputs.k, inputs.v, inputs.scale)
    if _is_large(inputs, backend) and not _has_kernel(inputs):
        return _chunked(inputs.with_mask(), backend)
    return _by_pytorch(inputs)


def _kernel(inputs: Inputs, backend: AttentionBackend) -> torch.Tensor:
    """One of PyTorch's kernels alone; for a head size, dtype, mask or device that it refuses, chunks, with a warning.

    Its operator is called: PyTorch's switches of kernels are those of the whole process, and so of other threads.
    """
    if backend.name == "math" or _takes(inputs, backend.name):
        return _KERNELS[backend.name](inputs)
    masked = "without a mask" if inputs.mask is None else "with a mask"
    warnings.warn(
        f"The attention backend {backend.name!r} does not take a head size of {inputs.q.shape[-1]} in {inputs.q.dtype} "
        f"on {device_type(inputs.q)!r} {masked}: 'chunked' does it.",
        stacklevel=3,
    )
    return _chunked(inputs, backend)


def _by_pytorch(inputs: Inputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=inputs.mask, is_causal=inputs.causal, scale=inputs.scale
    )


def _is_large(inputs: Inputs, backend: AttentionBackend) -> bool:
    if is_traced() or torch.compiler.is_compiling() or device_type(inputs.q) == "meta":
        return False
    return inputs.q.shape[:-1].numel() * inputs.k.shape[-2] * 4 > backend.chunk_bytes


def _has_kernel(inputs: Inputs) -> bool:
    """Whether one of the kernels that are switched on takes the input, not the matrix of scores."""
    if device_type(inputs.q) not in _TOLD:
        return False
    choose: Any = torch._fused_sdp_choice  # type: ignore[attr-defined]
    choice = choose(inputs.q, inputs.k, inputs.v, inputs.mask, 0.0, inputs.causal, scale=inputs.scale)
    return choice not in (SDPBackend.MATH.value, SDPBackend.ERROR.value)


# ---- PyTorch's kernels by their operators, called as `F.scaled_dot_product_attention` does


def _takes(inputs: Inputs, name: str) -> bool:
    """Whether this device has a kernel, which takes the input; a CPU has one besides the matrix of scores."""
    kind = device_type(inputs.q)
    if kind != "meta" and name not in _KERNELS_OF.get(kind, ()):
        return False
    if not _is_cuda(inputs):
        return _has_kernel(inputs)
    asked = torch.backends.cuda.SDPAParams(inputs.q, inputs.k, inputs.v, inputs.mask, 0.0, False, False)
    return _CAN_USE[name](asked)


def _is_cuda(inputs: Inputs) -> bool:
    return inputs.q.device.type == "cuda"


def _addend(inputs: Inputs) -> torch.Tensor | None:
    """The mask as what is added to the scores."""
    mask, q = inputs.mask, inputs.q
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=q.dtype, device=q.device))


def _math(inputs: Inputs) -> torch.Tensor:
    return aten._scaled_dot_product_attention_math(inputs.q, inputs.k, inputs.v, _addend(inputs), scale=inputs.scale)[0]


def _flash(inputs: Inputs) -> torch.Tensor:
    if not _is_cuda(inputs):
        cpu: Any = aten._scaled_dot_product_flash_attention_for_cpu
        return cpu(inputs.q, inputs.k, inputs.v, attn_mask=_addend(inputs), scale=inputs.scale)[0]
    size = inputs.q.shape[-1]
    scale = size**-0.5 if inputs.scale is None else inputs.scale
    filled = (F.pad(x, (0, -size % ALIGNED)) if size % ALIGNED else x for x in (inputs.q, inputs.k, inputs.v))
    return aten._scaled_dot_product_flash_attention(*filled, scale=scale)[0][..., :size]


def _efficient(inputs: Inputs) -> torch.Tensor:
    mask, keys = _addend(inputs), inputs.k.shape[-2]
    if mask is not None:
        if mask.stride(-1) != 1 or any(stride % ALIGNED for stride in mask.stride()[:-1]):
            mask = F.pad(mask, (0, ALIGNED - mask.shape[-1] % ALIGNED))[..., : mask.shape[-1]]
        mask = mask.expand(*inputs.q.shape[:-1], keys)
    attend: Any = aten._scaled_dot_product_efficient_attention
    return attend(inputs.q, inputs.k, inputs.v, mask, inputs.need_gradients, scale=inputs.scale)[0]


def _cudnn(inputs: Inputs) -> torch.Tensor:
    attend: Any = aten._scaled_dot_product_cudnn_attention
    return attend(inputs.q, inputs.k, inputs.v, _addend(inputs), inputs.need_gradients, scale=inputs.scale)[0]


_KERNELS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "math": _math,
}
_CAN_USE: dict[str, Callable[[Any], bool]] = {
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
}


def _chunked(inputs: Inputs, backend: AttentionBackend) -> torch.Tensor:
    """Exact attention, some queries and some keys at a time."""
    out, mask = inputs.output(), inputs.whole_mask
    # Two matrices of `side` squared numbers at once: the scores, and what is made of them.
    side = max(LEAST_SIDE, int((backend.chunk_bytes / 8 / inputs.q.shape[:-2].numel()) ** 0.5))
    for first in range(0, inputs.q.shape[-2], side):
        queries = slice(first, first + side)
        softmax = OnlineSoftmax(inputs.q[..., queries, :], inputs.scale)
        for start in range(0, inputs.k.shape[-2], side):
            keys = slice(start, start + side)
            some = None if mask is None else mask[..., queries, keys]
            softmax.add(inputs.k[..., keys, :], inputs.v[..., keys, :], some)
        out[..., queries, :] = softmax.result()
    return out


def _xformers(inputs: Inputs, backend: AttentionBackend) -> torch.Tensor:
    """The library's kernel, which has tokens before heads; a mask becomes an addend."""
    import xformers.ops  # type: ignore[import-not-found]

    bias = inputs.whole_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=inputs.q.dtype).masked_fill_(~bias, -torch.inf)
    q_BLNH, k_BSNH, v_BSNH = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    attend = xformers.ops.memory_efficient_attention
    return attend(q_BLNH, k_BSNH, v_BSNH, attn_bias=bias, op=backend.op, scale=inputs.scale).transpose(1, 2)


_COMPUTE: dict[str, Callable[[Inputs, AttentionBackend], torch.Tensor]] = {
    "sdpa": _sdpa,
    **dict.fromkeys(_KERNELS, _kernel),
    "xformers": _xformers,
    "chunked": _chunked,
}
BACKENDS = tuple(_COMPUTE)


class OnlineSoftmax:
    """Attention of some queries to keys and values that come in parts: exact, and never the whole matrix of scores.

    Sums of exp(score - m) and of exp(score - m) · value, where m is the largest score so far, are scaled anew when m
    grows (Milakov & Gimelshein 2018, alg. 3; Rabe & Staats 2021). Computes in float32, or float64 where q is.
    """

    def __init__(self, q_BNLH: torch.Tensor, scale: float | None = None) -> None:
        self._dtype = q_BNLH.dtype
        wide = torch.float64 if q_BNLH.dtype == torch.float64 else torch.float32
        self._q_BNLH = q_BNLH.to(wide) * (q_BNLH.shape[-1] ** -0.5 if scale is None else scale)
        self._largest_BNL1 = self._q_BNLH.new_full((*q_BNLH.shape[:-1], 1), -torch.inf)
        self._weight_BNL1 = torch.zeros_like(self._largest_BNL1)
        self._sum_BNLH: torch.Tensor | None = None

    def add(self, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Attend to more keys and values; `mask` as for `attention`, of these keys."""
        scores = self._q_BNLH @ k_BNSH.to(self._q_BNLH.dtype).transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        largest = torch.maximum(self._largest_BNL1, scores.amax(-1, keepdim=True))
        pivot = largest.masked_fill(largest == -torch.inf, 0)  # rows of which nothing is unmasked so far
        weights = scores.sub_(pivot).exp_()
        fade = (self._largest_BNL1 - pivot).exp_()
        values = weights @ v_BNSH.to(self._q_BNLH.dtype)
        self._sum_BNLH = values if self._sum_BNLH is None else self._sum_BNLH.mul_(fade).add_(values)
        self._weight_BNL1.mul_(fade).add_(weights.sum(-1, keepdim=True))
        self._largest_BNL1 = largest

    def result(self) -> torch.Tensor:
        """The attention `[B, N, L, H]`, in the dtype of q; zeros for queries that may attend to nothing."""
        assert self._sum_BNLH is not None
        weight_BNL1 = self._weight_BNL1.masked_fill(self._weight_BNL1 == 0, 1)
        return (self._sum_BNLH / weight_BNL1).to(self._dtype)
