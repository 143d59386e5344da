"""Weights in blocks of 32 numbers with one scale each, in 4 bits or in 8: see `lowtide.ops.block_layout`.

The product of a float16 scale and a code has at most 19 significant bits. So it is exact in float32, and it is rounded
once, to the dtype that computes: the numbers are those that any other reader of GGUF files makes of these bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowtide.ops.block_layout import BLOCK, LAYOUTS, Q4_0, BlockLayout
from lowtide.ops.quantization import LARGEST_INT8, slabs

FACTORS = (1.0, 0.9, -8 / 7)
"""Scales that are tried for a block of 4 bits: so many times the one with which its largest number is the code -8."""
_SCALE_BYTES = 2
_SIGNS = -0x7778
"""The highest bit of each half of a byte, in 16 bits: without it a code from 0 to 15 is a whole number from -8 to 7."""
_HIGH = -0x0F0F0F0F0F0F0F10
"""The high halves of 8 bytes."""


def quantize_blocks(weight: torch.Tensor, layout: BlockLayout, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The blocks of `weight`, uint8 `[rows, blocks of a row, bytes of a block]`.

    With `dtype` the numbers are rounded to that dtype first. In 4 bits the scale of a block is, of those that are
    tried, the one with the least squared error. Beside the result this takes memory for a few times `CHUNK` numbers.
    Raises `ValueError` for numbers that are not finite, or too large for a float16 scale.
    """
    blocks = torch.empty(layout.shape(weight.shape), dtype=torch.uint8, device=weight.device)
    pack = _packed_in_4_bits if layout is Q4_0 else _packed_in_8_bits
    for rows in slabs(weight):
        piece = weight[rows] if dtype is None else weight[rows].to(dtype)
        pack(piece.float().reshape(-1, BLOCK), blocks[rows].view(-1, layout.nbytes))
    return blocks


def dequantize_blocks(blocks: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill `out`, of any layout, with the numbers of `blocks`, rounded once to its dtype. Returns `out`.

    Beside `out` this takes memory for twice `CHUNK` numbers in float32.
    """
    nbytes = blocks.shape[-1]
    expand = _expand_4_bits if LAYOUTS[nbytes] is Q4_0 else _expand_8_bits
    in_order = torch.empty(0)
    for rows in slabs(out):
        piece, target = blocks[rows].view(-1, nbytes), out[rows]
        if target.dtype == torch.float32 and target.is_contiguous():
            expand(piece, target.view(-1, BLOCK))
        else:
            if in_order.shape != target.shape:
                in_order = torch.empty(target.shape, device=out.device)
            expand(piece, in_order.view(-1, BLOCK))
            target.copy_(in_order)
    return out


def _expand_4_bits(blocks_N18: torch.Tensor, out_N32: torch.Tensor) -> None:
    """Codes stay in the high halves of bytes, so 16 times as large as they are, with the sign where int8 has it."""
    scale_N1 = _scales(blocks_N18).mul_(1 / 16)
    codes = blocks_N18.view(torch.int16)[:, 1:].bitwise_xor(_SIGNS).view(torch.int64)
    half = BLOCK // 2
    torch.mul(codes.bitwise_and(_HIGH).view(torch.int8), scale_N1, out=out_N32[:, half:])
    codes.bitwise_left_shift_(4).bitwise_and_(_HIGH)
    torch.mul(codes.view(torch.int8), scale_N1, out=out_N32[:, :half])


def _expand_8_bits(blocks_N34: torch.Tensor, out_N32: torch.Tensor) -> None:
    torch.mul(blocks_N34.view(torch.int8)[:, _SCALE_BYTES:], _scales(blocks_N34), out=out_N32)


def _scales(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16)[:, :1].float()


class _Tried(NamedTuple):
    """What a scale makes of each block: the squared error, the scale as float16 holds it (both N1), and codes (N32)."""

    error: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor

    def or_better(self, other: _Tried) -> _Tried:
        is_better = other.error < self.error
        return _Tried(*(torch.where(is_better, theirs, own) for own, theirs in zip(self, other, strict=True)))


def _packed_in_4_bits(numbers_N32: torch.Tensor, blocks_N18: torch.Tensor) -> None:
    largest_N1 = numbers_N32.gather(1, numbers_N32.abs().argmax(1, keepdim=True))
    _check(largest_N1 / 7)
    best = _tried(numbers_N32, largest_N1 / -8)
    for factor in FACTORS[1:]:
        best = best.or_better(_tried(numbers_N32, largest_N1 * (factor / -8)))
    codes_N32 = best.codes
    fitted_N1 = (numbers_N32 * codes_N32).sum(1, keepdim=True) / codes_N32.square().sum(1, keepdim=True).clamp_min_(1)
    best = best.or_better(_tried(numbers_N32, fitted_N1))  # the best scale for these codes
    first, last = (best.codes + 8).to(torch.uint8).chunk(2, 1)
    blocks_N18.view(torch.float16)[:, :1] = best.scale
    blocks_N18[:, _SCALE_BYTES:] = last.bitwise_left_shift(4).bitwise_or_(first)


def _tried(numbers_N32: torch.Tensor, scale_N1: torch.Tensor) -> _Tried:
    scale_N1 = scale_N1.half().float()
    codes_N32 = (numbers_N32 / torch.where(scale_N1 == 0, 1, scale_N1)).round_().clamp_(-8, 7)
    error_N1 = (codes_N32 * scale_N1).sub_(numbers_N32).square_().sum(1, keepdim=True)
    return _Tried(error_N1, scale_N1, codes_N32)


def _packed_in_8_bits(numbers_N32: torch.Tensor, blocks_N34: torch.Tensor) -> None:
    scale_N1 = numbers_N32.abs().amax(1, keepdim=True) / LARGEST_INT8
    _check(scale_N1)
    scale_N1 = scale_N1.half().float()
    codes_N32 = (numbers_N32 / torch.where(scale_N1 == 0, 1, scale_N1)).round_().clamp_(-LARGEST_INT8, LARGEST_INT8)
    blocks_N34.view(torch.float16)[:, :1] = scale_N1
    blocks_N34.view(torch.int8)[:, _SCALE_BYTES:] = codes_N32


def _check(scale_N1: torch.Tensor) -> None:
    if not bool((scale_N1.abs() <= torch.finfo(torch.float16).max).all()):
        raise ValueError("a weight with numbers that are not finite, or above 400,000, has no float16 scale")
