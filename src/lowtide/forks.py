"""What a forked child makes anew: it has the objects of its parent, and of its threads only the one that forked.

A lock that another thread held at that moment would never be free again, and what only that thread would have ended
would never end.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_OMP_PAUSE_HARD = 2
"""`omp_pause_hard` of the OpenMP API 5.0, section 3.5.2: threads are ended too."""


class Forked(Protocol):
    """Something that is not as it was in a forked child."""

    def after_fork(self) -> None:
        """Go on in the child without the threads that only the parent has. All locks are as they should be by now."""
        ...


_locks: set[weakref.ref[Any]] = set()
_others: set[weakref.ref[Forked]] = set()
"""Plain sets: a `WeakSet` runs Python code where something ends, and an interrupt that comes into that is lost."""


def new_lock() -> Any:
    """A `threading.RLock` that is free in a forked child, unless the thread that forked holds it.

    One that its thread may take again: a collection of garbage may come inside it, and end there what an interrupt left
    and what takes it too.
    """
    lock = threading.RLock()
    _locks.add(weakref.ref(lock, _locks.discard))
    return lock


def tell_of_forks(thing: Forked) -> None:
    """Have `thing.after_fork` called in forked children, as long as something else keeps it."""
    _others.add(weakref.ref(thing, _others.discard))


def _begin_anew() -> None:
    for lock in _living(_locks):
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock._at_fork_reinit()  # as the locks of the standard library do
    broken: list[Exception] = []
    for thing in _living(_others):
        try:
            thing.after_fork()
        except Exception as error:  # the others are told all the same
            broken.append(error)
    if broken:
        raise broken[0]


def _living(references: set[weakref.ref[T]]) -> list[T]:
    things = [reference() for reference in list(references)]
    return [thing for thing in things if thing is not None]


def _end_workers() -> None:
    """Before a fork: end the threads with which GNU's OpenMP computes for this one. It makes them anew when needed.

    Its child would wait for them in its first large kernel, and for ever; with one thread alone, the sums of that
    kernel would be others. Other libraries see to it themselves.
    """
    with suppress(OSError):
        for path in _gnu_openmp():
            _end_workers_of(path)


def _gnu_openmp() -> set[str]:
    """The files from which GNU's OpenMP is loaded; none where nobody can have asked it for threads yet."""
    if "torch" not in sys.modules or sys.platform != "linux":
        return set()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    return set(re.findall(r"/.*/libgomp[^/\n]*$", maps, re.MULTILINE))


def _end_workers_of(path: str) -> None:
    import ctypes

    pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_OMP_PAUSE_HARD)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_workers, after_in_child=_begin_anew)
