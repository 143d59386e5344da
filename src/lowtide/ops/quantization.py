"""Weights in 8 bits: quantize once, dequantize whenever they are used.

w ≈ scale · q, with q in 8 bits and one scale for each output channel, or without a scale (a plain cast). bfloat16 holds
every scale exactly, and the scales of fp8 are powers of two. So q · scale has at most 16 significant bits and is
rounded once, to the dtype that computes: all functions below that compute it give the same bits.
fp8 formats: Micikevicius et al. 2022, "FP8 formats for deep learning", sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

STORAGE = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}
"""The 8-bit dtypes by name."""
LARGEST_INT8 = 127
FP8_CAPABILITY = (8, 9)
"""The least compute capability of CUDA devices that multiply in fp8."""
CHUNK = 2**19
"""Numbers that are converted at once: so few that the results between two steps stay in the cache."""


def quantize(
    weight: torch.Tensor, storage: torch.dtype, *, scaled: bool, channel_dim: int = 0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The numbers of `weight` in 8 bits, in its layout, and their scale (float32, `[O, 1, ...]`), None if not `scaled`.

    With `dtype` the numbers are rounded to that dtype first. Beside the result this takes memory for `CHUNK` numbers.
    Without a scale numbers are cast as PyTorch does, also those beyond 448 (e4m3fn) or 57344 (e5m2).
    Raises `ValueError` for a scale of numbers that are not finite, and for int8 without a scale.
    """
    if storage == torch.int8 and not scaled:
        raise ValueError("int8 without a scale is not possible: it would round every weight to a whole number.")
    values = torch.empty_strided(weight.shape, weight.stride(), dtype=storage, device=weight.device)
    scale = _scale(weight, storage, channel_dim, dtype or weight.dtype) if scaled else None
    for rows in slabs(weight):
        piece = weight[rows] if dtype is None else weight[rows].to(dtype)
        if scale is not None:
            piece = piece.float() / _of_rows(scale, rows)
        values[rows].copy_(piece.round_() if storage == torch.int8 else piece)
    return values, scale


def dequantize(
    values: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    has_nan: bool = False,
    scale_fits: bool = False,
) -> torch.Tensor:
    """Fill `out` with `scale` · `values`, rounded once to the dtype of `out`; both have one layout. Returns `out`.

    `has_nan` says that e4m3fn values hold NaN (see `holds_nan`). PyTorch then converts them, which takes six times as
    long on a CPU as the conversion here. `scale_fits` says that bfloat16 holds the scale (see `fits_bfloat16`), which
    makes the conversion faster with the same result.
    """
    in_bfloat16 = out.dtype == torch.bfloat16 and scale_fits
    in_steps = values.dtype == torch.float8_e4m3fn and values.device.type == "cpu" and not has_nan
    floats = torch.empty(0)
    for rows in slabs(values):
        piece, target = values[rows], out[rows]
        factor = None if scale is None else _of_rows(scale, rows)
        if in_steps and in_bfloat16:
            _e4m3_in_bfloat16(piece, factor, target)
        elif in_steps:
            floats = _e4m3_to_float(piece, factor, target, floats)
            target.copy_(floats)
        elif factor is None:
            target.copy_(piece)
        elif in_bfloat16:
            target.copy_(piece).mul_(factor.bfloat16())
        else:
            target.copy_(piece.float().mul_(factor))
    return out


def fp8_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x` `[..., K]` times the e4m3fn weight `[N, K]`; `x` is rounded to e4m3fn too, with a scale for each row.

    The hardware multiplies (`torch._scaled_mm`), and sums are rounded to bfloat16 once, since all scales are powers of
    two. The relative error is about 3.7 %, half of it from `x`; it is 2.6 % if only the weight is rounded. K and N are
    multiples of 16. A row of `x` that is not finite gives a row that is not finite. Raises `ValueError` for an `x` that
    is not bfloat16, and `RuntimeError` on a GPU without fp8 matrix units.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < FP8_CAPABILITY:
        raise RuntimeError(
            f"fp8_matmul needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more; "
            f"{torch.cuda.get_device_name(x.device)} has less. Cast without fp8_matmul: weights are then dequantized."
        )
    if x.dtype != torch.bfloat16:
        raise ValueError(f"fp8_matmul takes bfloat16, not {x.dtype}: compute in bfloat16, or cast without fp8_matmul.")
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.abs().amax(1, keepdim=True).float()
    row_scale = _power_of_two(largest / torch.finfo(torch.float8_e4m3fn).max)
    row_scale = torch.where(largest.isfinite(), row_scale, torch.nan)  # e4m3fn would turn infinity into 448
    no_scale = torch.ones((), device=x.device)
    small = (rows.float() / row_scale).to(torch.float8_e4m3fn)
    multiply: Any = getattr(torch, "_scaled_mm")  # noqa: B009
    out = multiply(small, values.t(), scale_a=no_scale, scale_b=no_scale, out_dtype=torch.bfloat16)
    out = out * row_scale.bfloat16()
    if scale is not None:
        out = out * scale.view(1, -1).bfloat16()
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], len(values))


def holds_nan(values: torch.Tensor) -> bool:
    """Whether e4m3fn values hold NaN; never true of another dtype."""
    if values.dtype != torch.float8_e4m3fn:
        return False
    return any(bool((values[rows].view(torch.int8) & 0x7F).eq(0x7F).any()) for rows in slabs(values))


def slabs(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight, each with about `CHUNK` numbers; on a GPU with sixteen times as many."""
    if weight.numel() == 0:
        return
    chunk = CHUNK if weight.device.type == "cpu" else 16 * CHUNK
    step = max(1, chunk // weight[0].numel())
    yield from (slice(start, start + step) for start in range(0, len(weight), step))


def _e4m3_in_bfloat16(values: torch.Tensor, factor: torch.Tensor | None, target: torch.Tensor) -> None:
    """Fill `target` in bfloat16: bits of e4m3fn moved there are 2⁻¹²⁰ of the number (the biases are 127 and 7).

    Numbers that are subnormal in e4m3fn are then subnormal in bfloat16, where a CPU computes slowly. So this is for
    scaled weights, which have hardly any of them; of a weight without a scale half can be subnormal.
    """
    assert factor is not None
    bits = target.view(torch.int16).copy_(values.view(torch.int8))  # the sign fills the upper byte
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # sign, the low 4 bits of the exponent, 3 of the fraction
    target.mul_((factor * 2.0**120).bfloat16())


def fits_bfloat16(scale: torch.Tensor | None) -> bool:
    """Whether there are scales and bfloat16 holds them, and 2¹²⁰ times them, exactly; true of those of `quantize`."""
    return scale is not None and bool(((scale.bfloat16() == scale) & (scale < 2.0**7)).all())


def _e4m3_to_float(
    values: torch.Tensor, factor: torch.Tensor | None, room: torch.Tensor, floats: torch.Tensor
) -> torch.Tensor:
    """Convert to float32 by way of float16, where e4m3fn's bits become the sign, 4 exponent bits and 3 fraction bits.

    Bits moved there are 2⁻⁸ of the number, since the exponents' biases are 15 and 7. `room` is overwritten if its
    numbers have 16 bits. `floats` takes the result if it has the right shape.
    """
    bits = room.view(torch.int16) if room.itemsize == 2 else torch.empty_like(values, dtype=torch.int16)
    bits.copy_(values.view(torch.int8))  # the sign fills the upper byte
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # and leaves bit 14, the highest of the exponent
    if floats.shape != values.shape:
        floats = torch.empty_strided(values.shape, values.stride())
    return floats.copy_(bits.view(torch.float16)).mul_(256.0 if factor is None else factor * 256.0)


def _scale(weight: torch.Tensor, storage: torch.dtype, channel_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """One positive scale for each channel, `[O, 1, ...]`, of numbers rounded to `dtype`; 1 for a channel of zeros."""
    others = [dim for dim in range(weight.dim()) if dim != channel_dim]
    parts = [weight[rows].abs().amax(others, keepdim=True).float() for rows in slabs(weight)]
    largest = (torch.cat(parts) if channel_dim == 0 else torch.stack(parts).amax(0)).to(dtype).float()
    if not bool(largest.isfinite().all()):
        raise ValueError("a weight with numbers that are not finite has no scale")
    if storage == torch.int8:
        # up to the next number of bfloat16, so that the largest weight stays within 127
        scale = (largest / LARGEST_INT8 * (1 + 2.0**-8)).bfloat16().float()
    else:
        scale = _power_of_two(largest / torch.finfo(storage).max)
    return torch.where(largest > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def _power_of_two(numbers: torch.Tensor) -> torch.Tensor:
    """The next power of two above each number; 1 for 0."""
    _, exponent = torch.frexp(numbers)
    return torch.where(numbers > 0, torch.ldexp(torch.ones_like(numbers), exponent), 1.0)


def _of_rows(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    return scale[rows] if len(scale) > 1 else scale
