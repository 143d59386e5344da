"""The seconds of a step in which weights come over one queue of copies, beside computing: arithmetic, and nothing else.

Copies are made one after another, in the order in which units are computed with. Each begins once the one before it has
ended and the last unit whose place it takes has been computed with. A unit is computed with once those before it are
done and its copy has ended. The host only asks for all of this, and is taken to be ahead of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SETTLING, _COUNTED = 2, 3
"""Steps until a step is like the next, and those whose mean counts then."""


@dataclass(frozen=True)
class Turn:
    """A unit that streams, in a step: seconds of its `copy`, of computing with it (`own`), and of computing with units
    that stay `after` it, before the next that streams. Its place was taken by the unit `behind` turns before it.
    """

    copy: float
    own: float
    after: float = 0.0
    behind: int = 1


def step_seconds(turns: Sequence[Turn], before: float = 0.0) -> float:
    """Seconds of a step in a row of them; `before` its first turn it computes with units that stay.

    A turn is behind one of the same step or of the one before.
    """
    count = len(turns)
    if not count:
        return before
    parts = [(turn.copy, turn.own, turn.after, turn.behind) for turn in turns]
    left = [0.0] * (count * (1 + _SETTLING + _COUNTED))  # of a step before, in which all was done at once
    now = copied = settled = 0.0
    at = count
    for step in range(_SETTLING + _COUNTED):
        if step == _SETTLING:
            settled = now
        now += before
        for copy, own, after, behind in parts:
            freed = left[at - behind]
            copied = (copied if copied > freed else freed) + copy
            now = left[at] = (now if now > copied else copied) + own
            now += after
            at += 1
    return (now - settled) / _COUNTED


def behind_in_ring(count: int, depth: int) -> list[int]:
    """For each of `count` turns, how many turns before it its place was taken: one of `depth` equal places."""
    return [min(depth, count)] * count


def behind_by_place(places: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The same where each unit has its own place, `sizes[turn]` bytes from `places[turn]` on, and places overlap."""
    ends = [place + size for place, size in zip(places, sizes, strict=True)]
    count, behind = len(places), []
    for turn, (start, end) in enumerate(zip(places, ends, strict=True)):
        for back in range(1, count + 1):
            other = (turn - back) % count
            if places[other] < end and start < ends[other]:
                break
        behind.append(back)
    return behind
