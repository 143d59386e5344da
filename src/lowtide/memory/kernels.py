"""What operators become on the device that is meant, and how much they compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from lowtide.memory.plan import Work
from lowtide.ops.meant import meant_device, standing_for

aten = torch.ops.aten
NOTHING = Work()
FREE = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "lift_fresh", "_unsafe_view", "alias"}
"""Operators that compute nothing."""
FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
LARGEST_HEAD_ON_CUDA = 256
"""Of PyTorch's flash and efficient kernels."""


def made_by(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on meta, also of those that have no form there."""
    if func is aten.mkldnn_convolution.default:
        x, weight, bias, padding, stride, dilation, groups = args
        return aten.convolution.default(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return func(*args, **kwargs)


# ---- how much is computed


def work_of(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> Work:
    """What an operator computes."""
    name = func.overloadpacket.__name__
    if name in FREE:
        return NOTHING
    if name in _OPERATIONS:
        kind, count = _OPERATIONS[name]
        return Work(**{kind: float(count(given, made))}, kernels=1)
    return Work(touched=float(sum(map(_touched, given)) + sum(map(_touched, made))), kernels=1)


def _touched(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _of_convolution(given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    weight = given[1]
    return 2 * made[0].numel() * (weight.numel() // weight.shape[0])


def _of_product(given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    return 2 * made[0].numel() * given[0].shape[-1]


def _of_sum_and_product(given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    return 2 * made[0].numel() * given[1].shape[-1]


def _of_attention(given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    q, k, v = given[:3]
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


_OPERATIONS: dict[str, tuple[str, Any]] = {
    "convolution": ("convolution", _of_convolution),
    "mkldnn_convolution": ("convolution", _of_convolution),
    "mm": ("product", _of_product),
    "bmm": ("product", _of_product),
    "addmm": ("product", _of_sum_and_product),
    "baddbmm": ("product", _of_sum_and_product),
    "_scaled_dot_product_flash_attention_for_cpu": ("attention", _of_attention),
    "_scaled_dot_product_flash_attention": ("attention", _of_attention),
    "_scaled_dot_product_efficient_attention": ("attention", _of_attention),
}


# ---- functions of several forms


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` by the kernel that the meant device chooses."""
    choice = chosen_kernel(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _as_addend(attn_mask, query.dtype)
    if choice == SDPBackend.FLASH_ATTENTION.value and meant_device() == "cpu":
        return FLASH_CPU(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if choice == SDPBackend.FLASH_ATTENTION.value:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if choice == SDPBackend.EFFICIENT_ATTENTION.value:
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _as_addend(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(
        mask, torch.zeros((), dtype=dtype, device="meta"), torch.full((), -torch.inf, dtype=dtype, device="meta")
    )


def chosen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """The number of the kernel that PyTorch chooses on the meant device."""
    if meant_device() == "cuda":
        return _chosen_on_cuda(query, attn_mask).value
    with standing_for(None):
        q, k, v, mask = (None if one is None else _without_numbers(one) for one in (query, key, value, attn_mask))
        choose: Any = torch._fused_sdp_choice  # type: ignore[attr-defined]
        return choose(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _chosen_on_cuda(query: torch.Tensor, mask: torch.Tensor | None) -> SDPBackend:
    if query.ndim != 4 or query.shape[-1] > LARGEST_HEAD_ON_CUDA or query.dtype == torch.float64:
        return SDPBackend.MATH
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return SDPBackend.FLASH_ATTENTION if is_half and mask is None else SDPBackend.EFFICIENT_ATTENTION


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of this shape and last stride, on the memory of one row."""
    row = torch.empty(max(1, (tensor.shape[-1] - 1) * tensor.stride(-1) + 1), dtype=tensor.dtype)
    return row.as_strided(tensor.shape, (*(0,) * (tensor.ndim - 1), tensor.stride(-1)))


def rms_norm(
    x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`F.rms_norm` as the meant device does it: one kernel on CUDA, its parts on a CPU."""
    if meant_device() == "cuda":
        out = torch.empty_like(x)
        return out
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    scaled = wide * torch.rsqrt(wide.pow(2).mean(dims, keepdim=True).add_(eps))
    made = scaled if weight is None else scaled * weight
    return made.type_as(x)


def elements(shape: Any) -> int:
    """Of a shape."""
    return math.prod(shape)
