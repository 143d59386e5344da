"""How numbers lie in blocks of 32, as GGUF files have them: a float16 scale, then the codes.

A block is 32 consecutive numbers of a row. The row is everything after the first dimension, flattened in the order of
the dimensions, whatever order the numbers have in memory. A tensor of one dimension is one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

BLOCK = 32


class BlockLayout(NamedTuple):
    """A kind of block by its name in GGUF files, and its bytes."""

    name: str
    nbytes: int

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Rows, blocks of a row and bytes of a block for a weight of this shape."""
        rows, inner = _rows(shape)
        return rows, inner // BLOCK, self.nbytes

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a weight of this shape."""
        return prod(self.shape(shape))


Q4_0 = BlockLayout("Q4_0", 18)
"""A number is (code - 8) · scale; the low halves of the 16 bytes are the first 16 codes, the high ones the others."""
Q8_0 = BlockLayout("Q8_0", 34)
"""A number is code · scale, with codes of 8 bits."""
LAYOUTS = {layout.nbytes: layout for layout in (Q4_0, Q8_0)}
"""The layouts by the bytes of a block, which tell them apart."""


def in_whole_blocks(shape: Sequence[int]) -> bool:
    """Whether the rows of a weight of this shape are whole blocks."""
    return len(shape) > 0 and _rows(shape)[1] % BLOCK == 0


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
