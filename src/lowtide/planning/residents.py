"""Which units stay on the device: those whose copies computing would have to wait for."""

from __future__ import annotations

from collections.abc import Sequence

_RANGE, _HALVINGS = 64.0, 12
"""How much slower or faster than the pace at which all copies take as long as all computing; how often it is halved."""


def in_step(sizes: Sequence[int], computes: Sequence[float], budget: int) -> list[int]:
    """Places of units of together at most `budget` bytes, so that copies and computing of the others keep in step.

    A pace is bytes that are copied in a second of computing. At a pace a unit stays if copies would fall behind by more
    than the largest unit. So what stays is in stretches with much to copy and little to compute, spread over them. The
    slowest pace whose units find room is taken.
    """
    even = sum(sizes) / (sum(computes) or 1.0)
    slow, fast = even / _RANGE, even * _RANGE
    chosen: list[int] = []
    for _ in range(_HALVINGS):
        pace = (slow * fast) ** 0.5
        staying = _staying(sizes, computes, pace)
        if sum(sizes[place] for place in staying) <= budget:
            chosen, fast = staying, pace
        else:
            slow = pace
    return chosen


def _staying(sizes: Sequence[int], computes: Sequence[float], pace: float) -> list[int]:
    slack, behind = max(sizes, default=0), 0.0
    staying: list[int] = []
    for _ in range(2):  # the second time with what the end leaves to the beginning
        staying = []
        for place, (size, compute) in enumerate(zip(sizes, computes, strict=True)):
            if behind + size > slack + pace * compute:
                staying.append(place)
                behind = max(behind - pace * compute, 0.0)
            else:
                behind = max(behind + size - pace * compute, 0.0)
    return staying
