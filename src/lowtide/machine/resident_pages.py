"""Which bytes of this process are in memory now (Linux, Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

_PAGE = mmap.PAGESIZE
_PRESENT = 1 << 63


def resident_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """How many bytes of these ranges of addresses (first, end) are in memory; each page counts once.

    All of them where the system does not say.
    """
    merged = _merged(ranges)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            return sum(_present(pagemap.fileno(), first, end) for first, end in merged)
    except OSError:
        return sum(end - first for first, end in merged)


def _present(pagemap: int, first: int, end: int) -> int:
    """Bytes in memory of a range that begins and ends with a page."""
    content = os.pread(pagemap, (end - first) // _PAGE * 8, first // _PAGE * 8)
    return _PAGE * sum(entry >= _PRESENT for entry in memoryview(content).cast("Q"))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pages that the ranges touch, as ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        first, end = start // _PAGE * _PAGE, -(-stop // _PAGE) * _PAGE
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return merged
