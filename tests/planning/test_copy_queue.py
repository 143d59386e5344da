"""The queue of copies that planner and benchmarks share: against what can be said without it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.memory.bounds import places
from lowtide.planning.copy_queue import Turn, behind_by_place, behind_in_ring, step_seconds

SECONDS = st.integers(1, 20).map(float)
PAIRS = st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=12)
QUICK = settings(deadline=None, max_examples=60)


def turns(pairs: list[tuple[float, float]], behind: list[int]) -> list[Turn]:
    return [Turn(copy, own, behind=back) for (copy, own), back in zip(pairs, behind, strict=True)]


@QUICK
@given(PAIRS)
def test_with_one_ahead_each_copy_runs_beside_the_unit_before(pairs: list[tuple[float, float]]) -> None:
    copies = [copy for copy, _ in pairs]
    expected = sum(max(own, copy) for (_, own), copy in zip(pairs, [*copies[1:], copies[0]], strict=True))
    assert step_seconds(turns(pairs, behind_in_ring(len(pairs), 2))) == pytest.approx(expected)


@QUICK
@given(PAIRS, st.integers(2, 6))
def test_no_step_beats_its_bound_and_depth_only_helps(pairs: list[tuple[float, float]], depth: int) -> None:
    bound = max(sum(copy for copy, _ in pairs), sum(own for _, own in pairs))
    shallow = step_seconds(turns(pairs, behind_in_ring(len(pairs), depth)))
    deep = step_seconds(turns(pairs, behind_in_ring(len(pairs), depth + 1)))
    assert shallow >= deep - 1e-9
    assert deep >= bound - 1e-9


def test_units_that_stay_give_copies_time() -> None:
    streaming = [Turn(10.0, 2.0, after=8.0, behind=2)] * 4
    assert step_seconds(streaming, before=3.0) == pytest.approx(4 * 10 + 3)
    assert step_seconds([Turn(10.0, 2.0, behind=2)] * 4) == pytest.approx(4 * 10)
    assert step_seconds([], before=3.0) == 3.0


def test_with_nothing_ahead_copies_and_computing_add_up() -> None:
    assert step_seconds([Turn(10.0, 2.0, behind=1)] * 4) == pytest.approx(4 * 12)


@QUICK
@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(0, 60))
def test_places_stay_within_the_room_and_what_is_behind_overlaps(sizes: list[int], more: int) -> None:
    room = max(sizes) + more
    starts = places(sizes, room)
    assert all(start >= 0 and start + size <= room for start, size in zip(starts, sizes, strict=True))
    for turn, back in enumerate(behind_by_place(starts, sizes)):
        mine = set(range(starts[turn], starts[turn] + sizes[turn]))
        others = [(turn - step) % len(sizes) for step in range(1, back + 1)]
        meet = [bool(mine & set(range(starts[other], starts[other] + sizes[other]))) for other in others]
        assert meet == [False] * (back - 1) + [True], "the nearest before it that takes of its place"
