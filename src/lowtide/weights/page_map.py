"""The pages of this process's memory: brought in, let go, and looked at (Linux; elsewhere they come when touched)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable

PAGE = mmap.PAGESIZE
_DONTNEED, _WILLNEED, _POPULATE_READ = 4, 3, 22  # Linux, <asm-generic/mman-common.h>
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61  # Linux, Documentation/admin-guide/mm/pagemap.rst


def bring_in(address: int, nbytes: int) -> bool:
    """Read the mapped pages of a range from the disk now; False where the system cannot, and they come when touched.

    Raises `OSError` if they cannot be read: the file does not reach so far any more, or the disk fails.
    """
    start, end = touched_pages(address, nbytes)
    _madvise(start, end - start, _WILLNEED)
    if _madvise(start, end - start, _POPULATE_READ) == 0:
        return True
    fault = ctypes.get_errno()
    if fault in (errno.EFAULT, errno.EIO):
        raise OSError(fault, "the mapped pages cannot be read")
    return False


def let_go(address: int, nbytes: int, *, edges: bool = False) -> None:
    """Drop the mapped pages of a range from this process; they come again when touched, as they are in the file.

    A page at either end may hold other bytes, perhaps written to: it is dropped with `edges` only.
    """
    start, end = touched_pages(address, nbytes)
    if not edges:
        start, end = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
    if end > start:
        _madvise(start, end - start, _DONTNEED)


def touched_pages(address: int, nbytes: int) -> tuple[int, int]:
    """The addresses at which the pages of a range begin and end."""
    return address // PAGE * PAGE, -(-(address + nbytes) // PAGE) * PAGE


def resident_bytes(start: int, end: int) -> int:
    """Bytes that are in memory, of whole pages; all of them where the system does not say."""
    entries = _entries(start, end)
    return end - start if entries is None else PAGE * sum(entry >= _PRESENT for entry in entries)


def is_untouched(address: int, nbytes: int) -> bool:
    """Whether no page of a range in a private mapping was written to; False where the system does not say."""
    entries = _entries(*touched_pages(address, nbytes))
    return entries is not None and not any(
        entry & _SWAPPED or (entry & _PRESENT and not entry & _OF_A_FILE) for entry in entries
    )


def _entries(start: int, end: int) -> memoryview | None:
    """What the system says of each page, a number of 64 bits; None where it says nothing."""
    count = (end - start) // PAGE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as page_map:
            content = os.pread(page_map.fileno(), count * 8, start // PAGE * 8)
    except OSError:
        return None
    return memoryview(content).cast("Q") if len(content) == count * 8 else None


def _find_madvise() -> Callable[[int, int, int], int]:
    if sys.platform != "linux":
        return lambda *_: -1
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_madvise = _find_madvise()
