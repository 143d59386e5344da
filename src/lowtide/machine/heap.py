"""The heap of this process: when freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextmanager
def without_collecting() -> Generator[None]:
    """Have Python look for no garbage while this lasts: among all objects of large libraries that takes long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def trim_heap() -> bool:
    """Give memory that was freed back to the system now (glibc only); whether that was possible.

    Short-lived blocks of many sizes leave the heap full of holes, which would stay in the process until its end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and trim(0) == 1


_M_TRIM_THRESHOLD = -1


_M_MMAP_THRESHOLD = -3


def steady_malloc(mmap_threshold: int = 2**20, trim_threshold: int = 2**20) -> bool:
    """Make freed memory go back to the system, so that resident memory follows what is in use.

    Sets glibc's `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`, in bytes, for this process. Without it glibc keeps freed
    blocks of up to 32 MiB, and the peak depends on chance. The default of 1 MiB is exact but slow, since every block
    has its pages made anew; 8 and 64 MiB cost no time and give back most. Returns whether it was done (glibc only).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    options = {_M_MMAP_THRESHOLD: mmap_threshold, _M_TRIM_THRESHOLD: trim_threshold}
    return all(mallopt(option, value) == 1 for option, value in options.items())
