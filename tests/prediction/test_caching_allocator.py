"""What the caching allocator reserves, in cases that can be worked out by hand from its rules."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lowtide.prediction.caching_allocator import (
    FREED,
    MIB,
    CachingAllocator,
    Event,
    has_expandable_segments,
    reserved_for,
    rounded,
)


def sizes(*nbytes: float) -> list[Event]:
    return [(place, int(size)) for place, size in enumerate(nbytes)]


ALONE = {
    "one byte": (1, 2 * MIB),
    "as small as can be large": (MIB, 2 * MIB),
    "a little more": (MIB + 1, 20 * MIB),
    "a little less than 10 MiB": (10 * MIB - 1024, 20 * MIB),
    "10 MiB less a byte, which is rounded up": (10 * MIB - 1, 10 * MIB),
    "10 MiB": (10 * MIB, 10 * MIB),
    "10 MiB and a byte": (10 * MIB + 1, 12 * MIB),
    "21 MiB": (21 * MIB, 22 * MIB),
    "nothing": (0, 0),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_tensor_takes_a_segment(name: str) -> None:
    nbytes, reserved = ALONE[name]
    assert reserved_for(sizes(nbytes), expandable=False) == reserved


TOGETHER = {
    "two of 1 MiB share a segment": (sizes(MIB, MIB), 2),
    "three do not": (sizes(MIB, MIB, MIB), 4),
    "4096 of 512 bytes fill one": (sizes(*[1] * 4096), 2),
    "and one more begins another": (sizes(*[1] * 4097), 4),
    "small ones take nothing of large segments": (sizes(2 * MIB, 512), 22),
    "9 and 9 MiB share 20, and 2 MiB are left": (sizes(9 * MIB, 9 * MIB, 2 * MIB), 20),
    "what is left is too little": (sizes(9 * MIB, 9 * MIB, 3 * MIB), 40),
    "14 MiB fit behind 6 in a segment of 20": (sizes(6 * MIB, 14 * MIB), 20),
    "1 MiB that is left is not split off": (sizes(19 * MIB, MIB + 512), 20 + 20),
    "more is": ([*sizes(20 * MIB), (0, FREED), (1, 18 * MIB), (2, 2 * MIB)], 20),
    "a block comes again": ([*sizes(30 * MIB), (0, FREED), (1, 29.5 * MIB)], 30),
    "a larger one does not fit into it": ([*sizes(30 * MIB), (0, FREED), (1, 31 * MIB)], 30 + 32),
    "the smallest that is large enough is taken": (
        [*sizes(40 * MIB, 30 * MIB), (0, FREED), (1, FREED), (2, 30 * MIB), (3, 40 * MIB)],
        70,
    ),
    "the end of a segment joins a block that is freed before it": (
        [*sizes(6 * MIB, 6 * MIB, 6 * MIB), (2, FREED), (3, 8 * MIB)],
        20,
    ),
    "two free blocks with one between them do not join": (
        [*sizes(6 * MIB, 6 * MIB, 6 * MIB), (0, FREED), (2, FREED), (3, 14 * MIB)],
        20 + 14,
    ),
    "they do when it is freed as well": (
        [*sizes(6 * MIB, 6 * MIB, 6 * MIB), (0, FREED), (2, FREED), (1, FREED), (3, 20 * MIB)],
        20,
    ),
    "segments do not join": ([*sizes(20 * MIB, 20 * MIB), (0, FREED), (1, FREED), (2, 40 * MIB)], 80),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_several_tensors(name: str) -> None:
    events, reserved = TOGETHER[name]
    assert reserved_for(((memory, int(nbytes)) for memory, nbytes in events), expandable=False) == reserved * MIB


EXPANDABLE = {
    "small ones grow by 2 MiB": (sizes(MIB, MIB, MIB), 4),
    "large ones by 20": (sizes(12 * MIB, 12 * MIB), 40),
    "each kind for itself": (sizes(512, 2 * MIB), 22),
    "what is free at the end counts": ([*sizes(12 * MIB, 8 * MIB), (1, FREED), (2, 28 * MIB)], 40),
    "neighbours join across what were segments": (
        [*sizes(20 * MIB, 20 * MIB), (0, FREED), (1, FREED), (2, 40 * MIB)],
        40,
    ),
    "a hole that is too small does not serve": ([*sizes(20 * MIB, 20 * MIB), (0, FREED), (2, 21 * MIB)], 80),
}


@pytest.mark.parametrize("name", EXPANDABLE)
def test_segments_that_expand(name: str) -> None:
    events, reserved = EXPANDABLE[name]
    assert reserved_for(events, expandable=True) == reserved * MIB


SHORT = {
    "what nothing is in goes back first": ([*sizes(30 * MIB), (0, FREED), (1, 31 * MIB)], 32),
    "also of the other kind": ([*sizes(512), (0, FREED), (1, 31 * MIB)], 32),
    "a block that serves is taken all the same": ([*sizes(30 * MIB), (0, FREED), (1, 5 * MIB), (2, 24 * MIB)], 30),
    "what holds a small part stays": ([*sizes(30 * MIB), (0, FREED), (1, 5 * MIB), (2, 26 * MIB)], 30 + 26),
    "the peak is not where it ends": ([*sizes(30 * MIB, 20 * MIB), (0, FREED), (1, FREED), (2, 32 * MIB)], 50),
}


@pytest.mark.parametrize("name", SHORT)
def test_where_memory_is_short(name: str) -> None:
    events, reserved = SHORT[name]
    assert reserved_for(events, expandable=False, is_short=True) == reserved * MIB


def test_whether_they_expand_is_asked_of_the_process() -> None:
    assert not has_expandable_segments({})
    assert has_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"})
    assert has_expandable_segments({"PYTORCH_ALLOC_CONF": "expandable_segments: true"})
    assert not has_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})


@pytest.mark.parametrize("expandable", [False, True])
def test_blocks_never_overlap_and_all_come_back(expandable: bool) -> None:
    dice = random.Random(0)
    allocator, alive = CachingAllocator(expandable), dict[int, int]()
    for memory in range(600):
        if alive and dice.random() < 0.45:
            gone = dice.choice(list(alive))
            del alive[gone]
            allocator.free(gone)
        nbytes = int(2 ** dice.uniform(8, 25))
        alive[memory] = rounded(nbytes)
        allocator.allocate(memory, nbytes)
        assert allocator.allocated == sum(alive.values()) <= allocator.reserved
        for is_small in (True, False):
            taken = [taken for taken in allocator._taken.values() if taken[1].is_small is is_small]
            spans = sorted((block.address, block.address + size) for block, _, size in taken)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for memory in alive:
        allocator.free(memory)
    free = [size for pool in allocator._pools.values() for size, _ in pool.free]
    assert allocator.allocated == 0
    assert sum(free) == allocator.reserved
    assert not expandable or len(free) == 2, "each segment is one block again"
