"""Convolutions and products with weights in oneDNN's own order of numbers, which PyTorch gives access to.

oneDNN arranges weights in blocks, as the processor's vectors are wide. PyTorch's own operators have it do so in every
call, or multiply by another library. Here it is done once. Results differ by rounding: sums are made in another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_KERNELS: Any = torch.ops.mkldnn
NOT_FUSED = "none", [], ""
"""Nothing is fused with the kernel: no function, without parameters, in no special way."""
Geometry = tuple[Any, Any, Any, int]
"""Of a convolution: padding, stride, dilation and groups."""


@cache
def has_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this dtype on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _KERNELS._is_mkldnn_bf16_supported())


def pack_convolution(weight: torch.Tensor, geometry: Geometry, shape: torch.Size) -> torch.Tensor:
    """A weight `[O, C, K, K]` for maps of a shape `[B, C, H, W]`; others may be convolved with it too."""
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, shape)


def packed_convolution(
    x_BCHW: torch.Tensor, packed: torch.Tensor, bias_O: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """Convolve `[B, C, H, W]` to `[B, O, h, w]`, with its channels last."""
    return _KERNELS._convolution_pointwise(x_BCHW, packed, bias_O, *geometry, *NOT_FUSED)


def pack_product(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight `[O, I]` for so many rows; other numbers of rows may be multiplied with it too."""
    return _KERNELS._reorder_linear_weight(weight.contiguous(), rows)


def packed_product(x: torch.Tensor, packed: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Multiply `[..., I]` to `[..., O]`."""
    return _KERNELS._linear_pointwise(x, packed, bias_O, *NOT_FUSED)
