"""What a run takes, and what a machine does in a second: the nouns that plans are made from.

Sizes in bytes, times in seconds, work in floating-point operations. Everything is frozen and free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowtide.memory.rule import Level

WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED = "whole", "sliced", "exact", "exact on disk", "blended"
WAYS = (WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED)
"""The ways to go through a stage: at once, one picture of a batch at a time, row by row with the finished rows in
memory or in a file, in blended tiles."""


@dataclass(frozen=True)
class Work:
    """What is computed: operations of convolutions, matrix products and attention; bytes that all the rest reads and
    writes, and `weights`, bytes that convolutions and products read of them.

    A multiplication and an addition are two operations. `kernels` counts the calls of kernels of every kind.
    `channels_last` are convolutions of maps laid out so, which `convolution` leaves out: a CPU is faster at them.
    """

    convolution: float = 0.0
    product: float = 0.0
    attention: float = 0.0
    touched: float = 0.0
    kernels: int = 0
    channels_last: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.convolution + other.convolution,
            self.product + other.product,
            self.attention + other.attention,
            self.touched + other.touched,
            self.kernels + other.kernels,
            self.channels_last + other.channels_last,
            self.weights + other.weights,
        )

    def times(self, count: float) -> Work:
        """So much of it."""
        return Work(
            self.convolution * count,
            self.product * count,
            self.attention * count,
            self.touched * count,
            int(self.kernels * count),
            self.channels_last * count,
            self.weights * count,
        )


@dataclass(frozen=True)
class Call:
    """One call of a component on one shape of input, its weights left out.

    `peak` bytes of tensors are alive at once, at most: inputs and outputs, and `workspace` bytes of kernels' own
    memory among them. `result` bytes are left when it ends; `stored` bytes of rows lie in a file in between. `paged`
    bytes of the peak are pages of rows, which leave no holes in a heap.
    """

    peak: int
    workspace: int
    result: int
    work: Work
    stored: int = 0
    paged: int = 0


@dataclass(frozen=True)
class UnitSize:
    """What comes to the device at once: `nbytes` aligned bytes of weights as they are computed with.

    `resting` bytes of them lie in the file, and `copied` ones are copied from there on a CPU too: the others are
    computed with where they lie. Units of several `modules` and those that stand `aside` count as
    `lowtide.memory.stream.Stream` counts them. `work` is what one call of the component computes with these weights,
    `leaf` its largest single layer's bytes. A unit that is not `called`, such as an encoder's where only decoding is
    done, is never read; of one read `by_rows`, such as an embedding, next to nothing.
    """

    name: str
    nbytes: int
    resting: int
    copied: int = 0
    modules: int = 1
    aside: bool = False
    work: Work = field(default_factory=Work)
    leaf: int = 0
    called: bool = True
    by_rows: bool = False


@dataclass(frozen=True)
class Component:
    """A network's weights, split in units for each level, in the order in which they are called.

    `castings` holds the same for weights that rest in 8 bits, by the casting's name. `in_file` tells whether the
    weights lie in files that they can be read from again.
    """

    name: str
    units: Mapping[Level, tuple[UnitSize, ...]]
    castings: Mapping[str, Mapping[Level, tuple[UnitSize, ...]]] = field(default_factory=dict)
    in_file: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are computed with."""
        return sum(unit.nbytes for unit in self.units[Level.WHOLE])


@dataclass(frozen=True)
class Stage:
    """A named stretch of a run, in which one component is called `calls` times.

    `ways` are the calls that it can be made of, by the names in `WAYS`. `carried` bytes are alive during all of it and
    in no call's peak: latents, embeddings, the scheduler's history, pictures made so far. `withheld` bytes of the
    device's memory this stage may not take, since it ran out there.
    """

    name: str
    component: str
    calls: int
    ways: Mapping[str, Call]
    carried: int = 0
    withheld: int = 0

    @property
    def keeps_heap(self) -> bool:
        """Whether freed memory is worth keeping at hand: where calls are many. A decoder's blocks are few and large."""
        return self.calls > 2 and set(self.ways) == {WHOLE}


@dataclass(frozen=True)
class Workload:
    """A run: its stages in order and the components in use; `made_for` says what was asked, such as the size."""

    components: Mapping[str, Component]
    stages: tuple[Stage, ...]
    dtype: str
    made_for: Mapping[str, Any] = field(default_factory=dict)
