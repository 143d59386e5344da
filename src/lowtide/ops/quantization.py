"""Weights in 8 bits: quantize once, dequantize whenever they are used.

w ≈ scale · q, with q in 8 bits and one scale for each output channel, or none (a plain cast). Scales are numbers that
bfloat16 holds exactly; those of fp8 are powers of two. So q · scale has at most 16 significant bits, it is rounded
once, to the dtype that is computed in, and every way of computing it below gives the same bits.
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
"""Of CUDA devices that multiply in fp8."""
CHUNK = 2**19
"""Numbers that are converted at once: what lies between the steps stays in the cache."""


def quantize(
    weight: torch.Tensor, storage: torch.dtype, *, scaled: bool, channel_dim: int = 0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The numbers of `weight` in 8 bits, laid out as they are, and the scale (float32, `[O, 1, ...]`), None for plain.

    `dtype` is a dtype that the numbers are rounded to before. Memory beyond the result: `CHUNK` numbers. Plain casts
    round as PyTorch does, which tells what comes of numbers beyond 448 (e4m3fn) or 57344 (e5m2).
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

    `has_nan` says that e4m3fn values hold patterns that are not numbers (see `holds_nan`): PyTorch's own conversion is
    used for these; on a CPU it takes six times as long as this one. `scale_fits` says that bfloat16 holds the scale
    (see `fits_bfloat16`): that is faster, and gives the same.
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
    """`x` `[..., K]` times the e4m3fn weight `[N, K]`, with `x` in e4m3fn too, each row with a scale of its own.

    The product is the hardware's (`torch._scaled_mm`), its sums are rounded to bfloat16 once: all scales are powers of
    two. Relative error about 3.7 %, half of it from `x`; 2.6 % where only the weight is rounded. K and N are multiples
    of 16. A row with what is not finite gives a row that is not. Raises `ValueError` for an `x` that is not bfloat16,
    `RuntimeError` on a GPU without fp8 matrix units.
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < FP8_CAPABILITY:
        raise RuntimeError(
            f"fp8_matmul needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more; "
            f"{torch.cuda.get_device_name(x.device)} has less. Cast without it: weights are then dequantized."
        )
    if x.dtype != torch.bfloat16:
        raise ValueError(f"fp8_matmul takes bfloat16, not {x.dtype}.")
    rows = x.reshape(-1, x.shape[-1])
    largest = rows.abs().amax(1, keepdim=True).float()
    row_scale = _power_of_two(largest / torch.finfo(torch.float8_e4m3fn).max)
    row_scale = torch.where(largest.isfinite(), row_scale, torch.nan)  # e4m3fn would make 448 of what is not finite
    one = torch.ones((), device=x.device)
    small = (rows.float() / row_scale).to(torch.float8_e4m3fn)
    multiply: Any = getattr(torch, "_scaled_mm")  # noqa: B009
    out = multiply(small, values.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    out = out * row_scale.bfloat16()
    if scale is not None:
        out = out * scale.view(1, -1).bfloat16()
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], len(values))


def holds_nan(values: torch.Tensor) -> bool:
    """Whether e4m3fn values hold the pattern of what is not a number."""
    if values.dtype != torch.float8_e4m3fn:
        return False
    return any(bool((values[rows].view(torch.int8) & 0x7F).eq(0x7F).any()) for rows in slabs(values))


def slabs(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of a weight that hold about `CHUNK` numbers together; on a GPU sixteen times as many."""
    if weight.numel() == 0:
        return
    chunk = CHUNK if weight.device.type == "cpu" else 16 * CHUNK
    step = max(1, chunk // weight[0].numel())
    yield from (slice(start, start + step) for start in range(0, len(weight), step))


def _e4m3_in_bfloat16(values: torch.Tensor, factor: torch.Tensor | None, target: torch.Tensor) -> None:
    """bfloat16, whose fields e4m3fn moves into: there the number is 2⁻¹²⁰ of what it was (biases 127 and 7).

    The few numbers that are below normal in e4m3fn are so here, and arithmetic with such is slow on a CPU: a way for
    scaled weights, which have hardly any, and not for plain ones, half of which can be such.
    """
    assert factor is not None
    bits = target.view(torch.int16).copy_(values.view(torch.int8))  # the sign fills the upper byte
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # sign, the low 4 bits of the exponent, 3 of the fraction
    target.mul_((factor * 2.0**120).bfloat16())


def fits_bfloat16(scale: torch.Tensor | None) -> bool:
    """Whether there are scales, and bfloat16 holds each exactly, and 2¹²⁰ times it; those of `quantize` are so."""
    return scale is not None and bool(((scale.bfloat16() == scale) & (scale < 2.0**7)).all())


def _e4m3_to_float(
    values: torch.Tensor, factor: torch.Tensor | None, room: torch.Tensor, floats: torch.Tensor
) -> torch.Tensor:
    """float32 by way of float16, whose sign, 4 of 5 exponent bits and 3 leading fraction bits are those of e4m3fn.

    Moved there, the number is 2⁻⁸ of what it was, since the exponents' biases are 15 and 7. `room` is overwritten if
    its numbers are of 16 bits; `floats` is where the result goes if it has its shape.
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
