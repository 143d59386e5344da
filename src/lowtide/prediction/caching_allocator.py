"""What PyTorch's caching allocator reserves of a device's memory, for what is allocated and freed in a trace.

The constants of segments are in `lowtide.machine.segments`; the rules are those of `should_split`,
`get_free_block` and `try_merge_blocks` of its allocators for CUDA, ROCm and XPU. Sizes are rounded up to 512 bytes. Up
to 1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and larger ones get a segment of their own,
rounded up to 2 MiB. The smallest free block that is large enough is taken, and what it has too much is split off: all
of it in small segments, more than 1 MiB of it in others. Freed blocks join free neighbours of their segment, and
segments are kept. With `expandable_segments` there is one segment for small and one for large blocks, which grows by 2
and by 20 MiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from lowtide.machine.segments import LARGE, MIB, has_expandable_segments, own_segment

GRAIN = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT = 20 * MIB

Event = tuple[int, int]
"""A number that stands for a piece of memory, and the bytes that it is allocated with; -1 where it is freed."""
FREED = -1


def rounded(nbytes: int) -> int:
    """Bytes that a tensor's memory takes."""
    return max(GRAIN, -(-nbytes // GRAIN) * GRAIN)


def reserved_for(events: Iterable[Event], *, expandable: bool | None = None, is_short: bool = False) -> int:
    """The most bytes that are reserved while these events happen, by an allocator that had nothing before.

    `expandable` is whether there are expandable segments; None is as this process asks. Where memory `is_short` what
    can go back does so before more is asked for: what is reserved then is about the least that is enough.
    """
    allocator = CachingAllocator(has_expandable_segments() if expandable is None else expandable, is_short)
    for memory, nbytes in events:
        if nbytes == FREED:
            allocator.free(memory)
        else:
            allocator.allocate(memory, nbytes)
    return allocator.peak


@dataclass(eq=False)
class _Block:
    """A part of a segment, at `address`, with its neighbours there."""

    address: int
    size: int
    is_free: bool = True
    before: _Block | None = None
    behind: _Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Free blocks are looked through in this order."""
        return self.size, self.address


@dataclass
class _Pool:
    """The segments for small or for large blocks, and what is free in them, the smallest first."""

    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, _Block] = field(default_factory=dict)
    last: _Block | None = None
    """The end of the segment that grows."""
    end: int = 0
    """Of the addresses that were reserved; each pool has its own."""

    def put(self, block: _Block) -> None:
        block.is_free = True
        self.blocks[block.address] = block
        insort(self.free, block.key)

    def take(self, block: _Block) -> _Block:
        del self.free[bisect_left(self.free, block.key)]
        del self.blocks[block.address]
        block.is_free = False
        return block

    def best(self, size: int) -> _Block | None:
        place = bisect_left(self.free, (size, 0))
        return self.take(self.blocks[self.free[place][1]]) if place < len(self.free) else None


class CachingAllocator:
    """The allocator of one device and one stream: bytes `allocated` and `reserved` now, and the `peak` of these."""

    def __init__(self, expandable: bool = False, is_short: bool = False) -> None:
        self.expandable, self.is_short = expandable, is_short
        self.allocated = self.reserved = self.peak = 0
        self._pools = {is_small: _Pool(is_small) for is_small in (True, False)}
        self._taken: dict[int, tuple[_Block, _Pool, int]] = {}

    def allocate(self, memory: int, nbytes: int) -> None:
        """Have a block of so many bytes, or of none, for `memory`."""
        if nbytes == 0:
            return
        size = rounded(nbytes)
        pool = self._pools[size <= SMALL]
        block = pool.best(size) or (self._grown(pool, size) if self.expandable else self._segment(pool, size))
        self._split(block, size, pool)
        self._taken[memory] = block, pool, size
        self.allocated += size

    def free(self, memory: int) -> None:
        """Have no block for it any more."""
        if memory not in self._taken:
            return
        block, pool, size = self._taken.pop(memory)
        self.allocated -= size
        for other in (block.before, block.behind):
            if other is not None and other.is_free:
                self._join(block, pool.take(other), pool)
        pool.put(block)

    def _segment(self, pool: _Pool, size: int) -> _Block:
        if self.is_short:
            self._give_back()
        large = LARGE_SEGMENT if size < LARGE else own_segment(size)
        return self._reserve(pool, SMALL_SEGMENT if pool.is_small else large)

    def _reserve(self, pool: _Pool, nbytes: int) -> _Block:
        block = _Block(pool.end, nbytes, is_free=False)
        pool.end += nbytes
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
        return block

    def _give_back(self) -> None:
        for pool in self._pools.values():
            for block in [block for block in pool.blocks.values() if block.before is None and block.behind is None]:
                self.reserved -= pool.take(block).size

    def _grown(self, pool: _Pool, size: int) -> _Block:
        """A block at the end of the segment that grows."""
        last, step = pool.last, SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        open_end = pool.take(last) if last is not None and last.is_free else None
        more = self._reserve(pool, -(-(size - (0 if open_end is None else open_end.size)) // step) * step)
        if last is not None:
            more.before, last.behind = last, more
        pool.last = more
        if open_end is not None:
            self._join(more, open_end, pool)
        return more

    def _split(self, block: _Block, size: int, pool: _Pool) -> None:
        rest = block.size - size
        if rest < GRAIN or (rest <= SMALL and not pool.is_small and not self.expandable):
            return
        block.size = size
        other = _Block(block.address + size, rest, before=block, behind=block.behind)
        if other.behind is not None:
            other.behind.before = other
        block.behind = other
        if pool.last is block:
            pool.last = other
        pool.put(other)

    def _join(self, block: _Block, other: _Block, pool: _Pool) -> None:
        """Add a neighbour, which is gone then."""
        if other is block.before:
            block.address, block.before = other.address, other.before
            if block.before is not None:
                block.before.behind = block
        else:
            block.behind = other.behind
            if block.behind is not None:
                block.behind.before = block
        block.size += other.size
        if pool.last is other:
            pool.last = block
