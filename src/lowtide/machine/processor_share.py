"""How much of the processors others took while something was measured, which may be slow because of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

MOST = 0.15
"""Share of our threads that others may take away before what was measured is not trusted."""
_GLANCE = 0.1
"""Seconds in which `is_busy` looks."""
_WORKING = ("user", "nice", "system", "irq", "softirq", "steal")


@dataclass(frozen=True)
class Share:
    """`others` is how many processors other processes kept busy meanwhile, `load` the system's average of a minute."""

    others: float
    load: float

    def was_busy(self, threads: int) -> bool:
        """Whether others took so much that this many threads of ours had too little left."""
        return self.others + threads > (psutil.cpu_count() or 1) + MOST * threads


class Watch:
    """Watches the processors from its making on."""

    def __init__(self) -> None:
        self._start, self._all, self._own = time.perf_counter(), _all_seconds(), _own_seconds()

    def share(self) -> Share:
        """What others took since."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        others = (_all_seconds() - self._all) - (_own_seconds() - self._own)
        return Share(max(others, 0.0) / seconds, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)


def is_busy(threads: int) -> bool:
    """Whether others leave too little now for so many threads of ours; looks for a tenth of a second."""
    watch = Watch()
    time.sleep(_GLANCE)
    return watch.share().was_busy(threads)


def _all_seconds() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in _WORKING)


def _own_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
