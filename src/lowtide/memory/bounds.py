"""How many bytes streaming takes: the arithmetic that the engine and the planner share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lowtide.machine.segments import ROUND_LARGE

ROWS_READ = 32 * 2**20
"""Of a mapped embedding, whose rows are read where they lie, at most so many bytes are taken to come into memory: for
every row the pages around it come too, and 500 tokens are 500 rows."""
STAGE_BYTES = 32 * 2**20
"""Of each of the two pinned buffers through which bytes go that are not pinned themselves, on their way to a GPU."""


@dataclass(frozen=True)
class Sizes:
    """Bytes on the device: `copied` into a buffer, and mapped in a `window` of a file.

    In a plan for an accelerator there is also the `rounding` of its allocator, which nobody uses.
    """

    copied: int = 0
    window: int = 0
    rounding: int = 0

    @property
    def used(self) -> int:
        """Bytes of weights."""
        return self.copied + self.window

    @property
    def total(self) -> int:
        """All of them."""
        return self.used + self.rounding

    def times(self, count: int) -> Sizes:
        """So many of this size."""
        return Sizes(self.copied * count, self.window * count, self.rounding * count)

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.copied + other.copied, self.window + other.window, self.rounding + other.rounding)


def summed(sizes: Iterable[Sizes]) -> Sizes:
    """Together."""
    copied = window = rounding = 0
    for size in sizes:  # plans are made of many such sums
        copied += size.copied
        window += size.window
        rounding += size.rounding
    return Sizes(copied, window, rounding)


def largest(sizes: Collection[Sizes]) -> Sizes:
    """The most of each kind."""
    kinds = ((unit.copied, unit.window, unit.rounding) for unit in sizes)
    return Sizes(*map(max, zip(*kinds, strict=True)))


def depth(prefetch: int, *, several: bool) -> int:
    """Units that may be on the device at once. A unit of `several` modules stays while others pass: one more then."""
    return prefetch + 1 + several


def bound(kept: Iterable[Sizes], streamed: Collection[Sizes], aside: Iterable[Sizes], depth: int) -> Sizes:
    """What a stream never exceeds: what is kept, `depth` of the largest streamed, and what stands aside."""
    return summed(kept) + largest(streamed).times(depth) + summed(aside)


def bound_by_bytes(
    kept: Iterable[Sizes],
    streamed: Collection[Sizes],
    aside: Iterable[Sizes],
    prefetch_bytes: int,
    *,
    several: bool,
) -> Sizes:
    """As `bound`, where units are loaded ahead as long as they find room in so many bytes.

    One more may be on the device where `several` modules share one that stays loaded between them.
    """
    extra = largest(streamed) if several else Sizes()
    return summed(kept) + rooms(streamed, prefetch_bytes) + extra + summed(aside)


def rooms(streamed: Collection[Sizes], prefetch_bytes: int) -> Sizes:
    """Bytes for buffers, and for windows: so many, at least the largest unit, and no more than all units together."""
    most, together = largest(streamed), summed(streamed)
    copied = min(max(prefetch_bytes, most.copied), together.copied)
    window = min(max(prefetch_bytes, most.window), together.window)
    return Sizes(copied, window, min(ROUND_LARGE, together.rounding))


def places(sizes: Sequence[int], room: int) -> list[int]:
    """Where each unit has its place in `room` bytes: behind the one before it, or at the beginning again."""
    starts, end = [], 0
    for size in sizes:
        end = end if end + size <= room else 0
        starts.append(end)
        end += size
    return starts


def least_room(sizes: Sequence[int], room: int) -> int:
    """The least room, to a hundredth, in which places begin anew no more often than in `room`."""
    begun, least, step = places(sizes, room).count(0), max(sizes, default=0), room
    for _ in range(7):
        step //= 2
        fits = room - step >= least and places(sizes, room - step).count(0) <= begun
        room -= step if fits else 0
    return room


def spread(sizes: Sequence[int], budget: int) -> list[int]:
    """Places of units of together at most `budget` bytes, spread over the list.

    Copies of the others then hide behind computing in between.
    """
    total, saved = sum(sizes), 0
    budget = min(budget, total)
    chosen: list[int] = []
    for place, size in enumerate(sizes):
        saved += size * budget
        if saved >= size * total > 0:
            chosen.append(place)
            saved -= size * total
    return chosen


def within(sizes: Sequence[int], budget: int | None) -> list[bool]:
    """For each unit in order, whether it still finds room in `budget` bytes (None: no limit)."""
    used, fitting = 0, []
    for size in sizes:
        fits = budget is None or used + size <= budget
        used += size if fits else 0
        fitting.append(fits)
    return fitting


ALIGNMENT = 256
"""Bytes; what kernels ask for, and more."""


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up to a whole number of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
