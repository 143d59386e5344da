"""Convolutions and products in 8 bits: weights rounded once, inputs rounded in each call, sums of whole numbers.

Inputs are rounded by what they hold (dynamic quantization): rows of a product each with a scale, maps of a convolution
each with a scale and a zero point, x ≈ s · (q − z) with q in 0...255. So the result for a sample does not depend on the
others of its batch. Sums are exact in 32 bits, in whatever order they are made. oneDNN multiplies, by the processor's
instructions for that (VNNI). Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", sec. 2.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from lowtide.ops.packed import NOT_FUSED, Geometry

_KERNELS: Any = torch.ops.onednn
COMPUTED = (torch.float32, torch.bfloat16)
"""The dtypes that inputs and results may have."""
CHUNK = 2**18
"""Numbers that are rounded at once: so few that what is between two steps stays in the cache."""
MIDDLE = 128
"""The zero point of rows, which are rounded to 1...255."""


@cache
def has_int8_products() -> bool:
    """Whether this machine's CPU has instructions for products in 8 bits, with which sums are exact."""
    if not torch.backends.mkldnn.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    largest_x, largest_w = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((1, 64), 127, dtype=torch.int8)
    try:
        packed = pack_int8_product(largest_w, 1)
        sums = _KERNELS.qlinear_pointwise(
            largest_x, 1.0, 0, packed, torch.ones(1), _zeros(1), None, 1.0, 0, torch.float32, *NOT_FUSED
        )
    except (RuntimeError, AttributeError):  # a build, or a version, without these kernels
        return False
    return sums.item() == 64 * 255 * 127  # without the instructions sums of two products are cut off at 16 bits


def pack_int8_convolution(weight: torch.Tensor, geometry: Geometry, shape: torch.Size) -> torch.Tensor:
    """An int8 weight `[O, C, K, K]` in oneDNN's order, for maps `[B, C, H, W]`; others may be convolved too."""
    padding, stride, dilation, groups = geometry
    return _KERNELS.qconv_prepack(weight, torch.ones(len(weight)), 1.0, 0, stride, padding, dilation, groups, shape)


def pack_int8_product(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """An int8 weight `[O, I]` in oneDNN's order, for so many rows; other numbers of rows may be multiplied too."""
    return _KERNELS.qlinear_prepack(weight, [rows, weight.shape[1]])


def int8_convolution(
    x_BCHW: torch.Tensor, packed: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """Convolve `[B, C, H, W]` to `[B, O, h, w]`, with its channels last.

    A map with a number that is not finite gives one of NaN.
    """
    padding, stride, dilation, groups = geometry
    zeros, bias = _zeros(len(scale_O)), None if bias_O is None else bias_O.float()
    made = [
        _KERNELS.qconv_pointwise(
            *_rounded_map(x_CHW), packed, scale_O, zeros, bias, stride, padding, dilation, groups, 1.0, 0, x_BCHW.dtype,
            *NOT_FUSED,
        )
        for x_CHW in x_BCHW
    ]  # fmt: skip
    return made[0] if len(made) == 1 else torch.cat(made)


def int8_product(
    x: torch.Tensor, packed: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Multiply `[..., I]` to `[..., O]`. A row with a number that is not finite gives a row that is not finite."""
    rows_RI = x.reshape(-1, x.shape[-1])
    small_RI, scale_R1 = _rounded_rows(rows_RI)
    zeros = _zeros(len(scale_O))
    out = _KERNELS.qlinear_pointwise(
        small_RI, 1.0, MIDDLE, packed, scale_O, zeros, None, 1.0, 0, torch.float32, *NOT_FUSED
    )
    del small_RI
    out = out.mul_(scale_R1) if bias_O is None else torch.addcmul(bias_O.float(), out, scale_R1, out=out)
    return out.to(x.dtype).view(*x.shape[:-1], len(scale_O))


def _rounded_map(x_CHW: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """One map as `[1, C, H, W]` in 0...255 with its channels last, its scale and its zero point."""
    channels_last = x_CHW.permute(1, 2, 0)
    numbers = channels_last if channels_last.is_contiguous() else x_CHW.contiguous()
    low, high = (float(bound) for bound in torch.aminmax(numbers.view(-1)))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 254 or 1.0  # 254: rounding the zero point moves numbers by up to a half
    if not math.isfinite(scale):
        scale, zero, inverse = math.nan, 0, 0.0
    else:
        zero, inverse = round(-low / scale), 1 / scale
    small = torch.empty(numbers.shape, dtype=torch.uint8)
    shift = torch.tensor(zero + 0.5)
    for piece, target in zip(numbers.view(-1).split(CHUNK), small.view(-1).split(CHUNK), strict=True):
        target.copy_(torch.add(shift, piece.float(), alpha=inverse))  # what comes after the point is cut off
    small_HWC = small if numbers is channels_last else small.permute(1, 2, 0).contiguous()
    return small_HWC.permute(2, 0, 1)[None], scale, zero


def _rounded_rows(rows_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 1...255, where `MIDDLE` is 0, and the scale of each, `[R, 1]`."""
    count, width = rows_RI.shape
    small, scale_R1 = torch.empty(rows_RI.shape, dtype=torch.uint8), torch.empty(count, 1)
    middle = torch.tensor(MIDDLE + 0.5)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, count, step):
        piece = rows_RI[start : start + step].float()
        scale = (piece.abs().amax(1, keepdim=True) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        small[start : start + step].copy_(torch.addcmul(middle, piece, scale.reciprocal()))
        scale_R1[start : start + step] = scale
    return small, scale_R1


@cache
def _zeros(count: int) -> torch.Tensor:
    """The zero points of a weight's channels."""
    return torch.zeros(count, dtype=torch.int32)
