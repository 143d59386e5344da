"""The heap of this process: when freed memory goes back to the system.

What is set here holds for the whole process, so it has one owner each, which knows all that ask for something.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager

from lowtide.calls import Call, Calls
from lowtide.forks import new_lock, tell_of_forks

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

Thresholds = tuple[int, int]
"""Bytes from which a block has pages of its own, and of freed memory that the heap keeps."""
FRUGAL: Thresholds = (2**20, 2**20)


class _Collector:
    """Whether Python looks for garbage: not while anybody asks for that."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._asking: Calls[Call] = Calls()
        self._was_on = False
        tell_of_forks(self)

    def stop(self, asking: Call) -> None:
        """Look for none until all that asked for that need it no more."""
        with self._lock:
            self._asking.begin(asking)
            if gc.isenabled():
                self._was_on = True
                gc.disable()

    def go_on(self, asking: Call) -> None:
        """One that asked needs it no more."""
        with self._lock:
            self._asking.end(asking)
            if not self._asking and self._was_on:
                self._was_on = False
                gc.enable()

    def after_fork(self) -> None:
        """In a forked child other threads ask for nothing any more."""
        self._asking.after_fork()
        self.go_on(Call())


_COLLECTOR = _Collector()


@contextmanager
def without_collecting() -> Generator[None]:
    """Have Python look for no garbage while this lasts: among all objects of large libraries that takes long."""
    this = Call()
    try:
        _COLLECTOR.stop(this)
        yield
    finally:
        _COLLECTOR.go_on(this)


def trim_heap() -> bool:
    """Give memory that was freed back to the system now (glibc only); whether that was possible.

    Short-lived blocks of many sizes leave the heap full of holes, which would stay in the process until its end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and trim(0) == 1


class Wish(Call):
    """Somebody who wishes for thresholds, as long as this is kept."""

    thresholds: Thresholds = FRUGAL


class Malloc:
    """glibc's thresholds: the smallest that anybody present wishes, and the usual ones while nobody is."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._usual = FRUGAL
        self._wishes: Calls[Wish] = Calls()

    def wish(self, wish: Wish, thresholds: Thresholds) -> None:
        """Have these thresholds or smaller ones until `wish` leaves or is for others."""
        with self._lock:
            wish.thresholds = thresholds
            self._wishes.begin(wish)
            self._set()

    def leave(self, wish: Wish) -> None:
        """What was wished for is needed no more."""
        with self._lock:
            self._wishes.end(wish)
            self._set()

    def make_usual(self, thresholds: Thresholds) -> bool:
        """Have these thresholds while nobody wishes for others; whether they can be set (glibc only)."""
        with self._lock:
            self._usual = thresholds
            return self._set()

    def _set(self) -> bool:
        wishes = [wish.thresholds for wish in self._wishes] or [self._usual]
        return _set_thresholds((min(mmap for mmap, _ in wishes), min(trim for _, trim in wishes)))


MALLOC = Malloc()
"""The one of this process."""


def _set_thresholds(thresholds: Thresholds) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    options = zip((_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD), thresholds, strict=True)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in options)


def steady_malloc(mmap_threshold: int = FRUGAL[0], trim_threshold: int = FRUGAL[1]) -> bool:
    """Make freed memory go back to the system, so that resident memory follows what is in use.

    Sets glibc's `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`, in bytes, for this process; the stages of runs under a plan
    have their own while they last. Without it glibc keeps freed blocks of up to 32 MiB, and the peak depends on chance.
    The default of 1 MiB is exact but slow, since every block has its pages made anew; 8 and 64 MiB cost no time and
    give back most. Returns whether it can be done (glibc only).
    """
    return MALLOC.make_usual((mmap_threshold, trim_threshold))
