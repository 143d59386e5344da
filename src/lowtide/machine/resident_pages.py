"""Which bytes of this process are in memory now."""

from __future__ import annotations

from collections.abc import Iterable

from lowtide.weights import page_map


def resident_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """How many bytes of these ranges of addresses (first, end) are in memory; each page counts once.

    All of them where the system does not say.
    """
    return sum(page_map.resident_bytes(start, end) for start, end in _merged(ranges))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pages that the ranges touch, as ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        start, end = page_map.touched_pages(first, last - first)
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
