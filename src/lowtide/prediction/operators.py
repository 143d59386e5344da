"""What operators become on the device that is meant, and how much they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend

from lowtide.ops.meta_device import meant_device, standing_for
from lowtide.planning.workload import Work
from lowtide.prediction.elementwise import laid_out

aten = torch.ops.aten
NOTHING = Work()
FREE = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "lift_fresh", "_unsafe_view", "alias"}
"""Operators that compute nothing."""
FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
LARGEST_HEAD_ON_CUDA = 256
"""Of PyTorch's flash and efficient kernels."""


def made_by(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on meta, laid out as on the meant device, also of those that have no form on meta."""
    if func is aten.mkldnn_convolution.default:
        x, weight, _, padding, stride, dilation, _ = args
        return _convolved(x, weight, stride, padding, dilation)
    if func is aten.convolution.default and not args[6]:
        return _convolved(args[0], args[1], *args[3:6])
    result = func(*args, **kwargs)
    if func is aten.native_group_norm.default and is_channels_last(args[0]):
        return _with_channels_last(result[0]), *result[1:]
    return laid_out(func, args, kwargs, result)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether kernels take a map or clip to have its channels last: by its strides, as PyTorch looks at them."""
    if x.ndim not in (4, 5) or x.stride(1) == 0 or x.numel() == 0:
        return False
    least = 0
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return False
        least = x.stride(dim) * x.shape[dim]
    return True


def _convolved(x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any) -> torch.Tensor:
    """Room for the result of a convolution: with channels last if the map or the weight has them so."""
    sizes = [
        (side + 2 * pad - step * (size - 1) - 1) // jump + 1
        for side, size, jump, pad, step in zip(
            x.shape[2:],
            weight.shape[2:],
            *(_each(setting, x.ndim - 2) for setting in (stride, padding, dilation)),
            strict=True,
        )
    ]
    made = x.new_empty((len(x), len(weight), *sizes))
    if not (is_channels_last(x) or is_channels_last(weight)):
        return made
    return _with_channels_last(made)


def _with_channels_last(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _each(numbers: Any, count: int) -> Any:
    return numbers if len(numbers) == count else list(numbers) * count


# ---- how much is computed


def work_of(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> Work:
    """What an operator computes."""
    name = func.overloadpacket.__name__
    if name in FREE:
        return NOTHING
    if name in _OPERATIONS:
        kind, count = _OPERATIONS[name]
        if kind == "convolution" and is_channels_last(given[0]) and not given[0].is_contiguous():
            kind = "channels_last"
        weights = float(_weights(kind, given))
        arranged = weights if kind == "convolution" else 0.0
        return Work(**{kind: float(count(given, made))}, weights=weights, kernels=1, arranged=arranged)
    return Work(touched=float(sum(map(_touched, given)) + sum(map(_touched, made))), kernels=1)


def _weights(kind: str, given: list[torch.Tensor]) -> int:
    """Bytes of weights that come from memory."""
    if kind == "attention":
        return 0
    return _touched(given[1]) if kind != "product" else max(map(_touched, given))


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
    if meant_device() in ("cuda", "xpu"):
        return _chosen_on_gpu(query, attn_mask).value
    if meant_device() not in ("cpu", None):
        return SDPBackend.MATH.value
    with standing_for(None):
        q, k, v, mask = (
            None if tensor is None else _without_numbers(tensor) for tensor in (query, key, value, attn_mask)
        )
        choose: Any = torch._fused_sdp_choice  # type: ignore[attr-defined]
        return choose(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _chosen_on_gpu(query: torch.Tensor, mask: torch.Tensor | None) -> SDPBackend:
    if query.ndim != 4 or query.shape[-1] > LARGEST_HEAD_ON_CUDA or query.dtype == torch.float64:
        return SDPBackend.MATH
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return SDPBackend.FLASH_ATTENTION if is_half and mask is None else SDPBackend.EFFICIENT_ATTENTION


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of this shape and last stride, on the memory of one row."""
    row = torch.empty(max(1, (tensor.shape[-1] - 1) * tensor.stride(-1) + 1), dtype=tensor.dtype)
    return row.as_strided(tensor.shape, (*(0,) * (tensor.ndim - 1), tensor.stride(-1)))


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`F.group_norm` as the meant device does it: on a CPU it takes maps with channels last as they are."""
    if meant_device() == "cpu" and is_channels_last(x):
        sizes = len(x), x.shape[1], x[0, 0].numel()
        return aten.native_group_norm(x, weight, bias, *sizes, num_groups, eps)[0]
    return torch.group_norm(x, num_groups, weight, bias, eps)


def rms_norm(
    x: torch.Tensor, normalized_shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`F.rms_norm` as the meant device does it: one kernel on CUDA, its parts elsewhere."""
    if meant_device() == "cuda":
        return aten._fused_rms_norm(x, normalized_shape, weight, eps)[0]
    return torch.rms_norm(x, normalized_shape, weight, eps)


REWRITTEN = {
    torch.nn.functional.scaled_dot_product_attention: attend,
    torch._fused_sdp_choice: chosen_kernel,  # type: ignore[attr-defined]
    torch.nn.functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    torch.nn.functional.group_norm: group_norm,
}
"""Functions whose form the meta device would choose otherwise."""
