"""What a run takes on any machine: its stages, the calls in them, and its weights unit by unit.

Sizes in bytes, times in seconds, work in floating-point operations. Everything is frozen and free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowtide.memory.rule import Level

WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED = "whole", "sliced", "exact", "exact on disk", "blended"
WAYS = (WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED)
"""The ways to go through a stage: the whole batch at once, one picture at a time, row by row with the finished rows in
memory, row by row with them in a file, in blended tiles."""


@dataclass(frozen=True)
class Work:
    """The work of a call: operations of `convolution`, matrix `product` and `attention`; bytes `touched` by the rest.

    A multiplication and an addition are two operations. `weights` are bytes of weights that convolutions and products
    read. `kernels` counts the calls of kernels of every kind. `channels_last` are operations of convolutions of maps in
    that layout, which a CPU is faster at; `convolution` leaves them out. `arranged` are the bytes of weights of
    `convolution`, which kernels on a CPU bring to an order of their own.
    """

    convolution: float = 0.0
    product: float = 0.0
    attention: float = 0.0
    touched: float = 0.0
    kernels: int = 0
    channels_last: float = 0.0
    weights: float = 0.0
    arranged: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.convolution + other.convolution,
            self.product + other.product,
            self.attention + other.attention,
            self.touched + other.touched,
            self.kernels + other.kernels,
            self.channels_last + other.channels_last,
            self.weights + other.weights,
            self.arranged + other.arranged,
        )

    def times(self, count: float) -> Work:
        """The work of `count` such calls."""
        return Work(
            self.convolution * count,
            self.product * count,
            self.attention * count,
            self.touched * count,
            int(self.kernels * count),
            self.channels_last * count,
            self.weights * count,
            self.arranged * count,
        )


@dataclass(frozen=True)
class Call:
    """What one call of a component takes for one shape of input, its weights left out.

    At most `peak` bytes of tensors are alive at once: inputs, outputs, and `workspace` bytes of the kernels' own memory
    are counted in. `result` bytes are left after the call. During it `stored` bytes of rows lie in a file. `paged`
    bytes of the peak are pages of rows, which leave no holes in a heap. A caching allocator needs `spare` bytes more
    than the peak.
    """

    peak: int
    workspace: int
    result: int
    work: Work
    stored: int = 0
    paged: int = 0
    spare: int = 0


@dataclass(frozen=True)
class UnitSize:
    """The size of a unit: `nbytes` aligned bytes of weights in the form in which they work.

    `resting` bytes lie in the file. Even on a CPU `copied` bytes are copied from there; the others work where they lie.
    `modules` are those in the unit, and a unit `aside` is outside the ring of buffers: see
    `lowtide.memory.stream.Stream`. `work` is what one call of the component computes with these weights, `leaf` the
    bytes of the unit's largest layer. A unit that is not `called`, such as an encoder's in a run that only decodes, is
    never read. Of a unit read `by_rows`, such as an embedding, next to nothing is read. `registered` is its place in
    the order in which the module has its parts, in which a rule chooses units.
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
    registered: int = 0


@dataclass(frozen=True)
class Component:
    """A network's weights, split into units at each level, in the order in which they are called.

    `castings` holds the units of weights that rest in 8 or 4 bits, by the casting's name. `in_file` tells whether the
    weights can be read again from files, `movable` whether they can be moved at all, and `in_few_bits` whether some
    rest in 8 bits or fewer without a casting, as they do in files.
    """

    name: str
    units: Mapping[Level, tuple[UnitSize, ...]]
    castings: Mapping[str, Mapping[Level, tuple[UnitSize, ...]]] = field(default_factory=dict)
    in_file: bool = True
    movable: bool = True
    in_few_bits: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they work or as they rest in few bits."""
        return sum(unit.nbytes for unit in self.units[Level.WHOLE])


@dataclass(frozen=True)
class Stage:
    """A named stretch of a run, in which one component is called `calls` times, in `visits` stretches without others.

    `ways` holds what one call takes in each possible way, by the names in `WAYS`. `carried` bytes are alive during the
    whole stage and in no call's peak: latents, embeddings, the scheduler's history, finished pictures. `withheld` bytes
    of the device's memory are kept from this stage, because memory ran out in it before.
    """

    name: str
    component: str
    calls: int
    ways: Mapping[str, Call]
    carried: int = 0
    withheld: int = 0
    visits: int = 1

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
