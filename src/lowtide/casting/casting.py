"""What casting means: which weights rest in another form, in which one, and what they compute in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Self

from lowtide.ops.block_layout import Q4_0, in_whole_blocks

NEVER_CAST = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""Patterns of the names of modules that are not cast where nothing else is asked for: they decide on quality."""


@dataclass(frozen=True)
class Casting:
    """How the weights of layers rest in 8 or 4 bits: convolutions, linear layers and embeddings, and only these.

    `storage` is "float8_e4m3fn", "float8_e5m2" or "int8"; "int4", which has a scale for every 32 numbers of a row, and
    leaves weights whose rows are no multiple of 32 to int8 (`storage_of`); or "packed", which loses nothing: the
    numbers of convolutions and linear layers in the order in which a CPU multiplies, see
    `lowtide.casting.packed_weight`. `scaled` gives each output channel a scale, so that its largest weight takes the
    largest 8-bit number: what is lost does not depend on how large the weights are, and biases stay as they are.
    Without it fp8 is a plain cast; int8 and int4 are always scaled. `compute` is the dtype that layers compute in
    (None: the one they have). Modules whose name matches a pattern (`re.search`) of `skip_patterns`, or whose class is
    one of `skip_classes`, are left out with all that is inside them; with neither, every module is cast.
    With `fp8_matmul` linear layers whose sides are multiples of 16 multiply in fp8, the input rounded too, where they
    compute in bfloat16: for GPUs of compute capability 8.9 or more. With `int8_matmul` convolutions and linear layers
    multiply in int8, the input rounded too: for CPUs with instructions for that; elsewhere weights are dequantized.
    Raises `ValueError` for what is not possible.
    """

    storage: str = "float8_e4m3fn"
    scaled: bool = False
    fp8_matmul: bool = False
    int8_matmul: bool = False
    compute: str | None = None
    skip_patterns: tuple[str, ...] = NEVER_CAST
    skip_classes: tuple[type, ...] = ()

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"storage={self.storage!r} is not possible: it is one of {', '.join(STORAGES)}.")
        if self.fp8_matmul and self.storage != "float8_e4m3fn":
            raise ValueError(f"fp8_matmul with storage={self.storage!r} is not possible: hardware takes float8_e4m3fn.")
        if self.int8_matmul and self.storage != "int8":
            raise ValueError(f"int8_matmul with storage={self.storage!r} is not possible: weights must be in int8.")
        if self.storage in ("int8", INT4):
            object.__setattr__(self, "scaled", True)

    @property
    def loses(self) -> bool:
        """Whether numbers are rounded."""
        return self.storage != PACKED

    def storage_of(self, shape: Sequence[int]) -> str:
        """The storage of a weight of this shape: int4 is for rows that are whole blocks, and int8 for the others."""
        return self.storage if self.storage != INT4 or in_whole_blocks(shape) else "int8"

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight of this shape where numbers are rounded, without a scale that is beside them."""
        return Q4_0.size(shape) if self.storage_of(shape) == INT4 else prod(shape)

    def sparing(self, patterns: Iterable[str]) -> Self:
        """The same without modules whose names match further patterns, where numbers are rounded."""
        return replace(self, skip_patterns=(*self.skip_patterns, *patterns)) if self.loses else self


PACKED, INT8_DYNAMIC, INT4 = "packed", "int8_dynamic", "int4"
LAZILY_PACKED = (PACKED, INT8_DYNAMIC)
"""Castings whose weights are brought to a kernel's order in their layer's first call."""
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")
STORAGES = (*EIGHT_BITS, INT4, PACKED)


NAMED_CASTINGS = {
    "fp8": Casting("float8_e4m3fn", scaled=True),
    "int8": Casting("int8"),
    INT8_DYNAMIC: Casting("int8", int8_matmul=True),
    INT4: Casting(INT4),
    PACKED: Casting(PACKED, skip_patterns=()),
}
