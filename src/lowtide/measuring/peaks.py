"""Peak memory of this process and its accelerators over consecutive intervals.

Exact: the peak of resident memory on Linux (`VmHWM`, reset by writing 5 to `/proc/self/clear_refs`; the kernel's
counters may lag by some 100 KiB) and the peak of PyTorch's allocator for the device.
Sampled, so lower bounds: the split into anonymous and file-backed memory, for which the kernel keeps no high-water
mark; and resident memory where `clear_refs` is missing. A thread samples every `interval` seconds.
File-backed counts the touched pages of mapped files and shared memory: both can be dropped or are shared.
The marks of the kernel and of PyTorch are those of the whole process: whoever begins them anew hands what they said to
all who are open then.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import psutil

from lowtide.calls import Call, Calls
from lowtide.forks import new_lock, tell_of_forks

if TYPE_CHECKING:
    import torch

    from lowtide.machine.accelerators import Accelerator

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_LONGEST_STATUS = 1 << 16
"""Bytes; some 1,500 are usual, and the list of allowed processors grows with the machine."""


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of one interval; `None` where this machine cannot tell.

    `shared` tells whether another source was open at any time in it, so that another run may be in the peaks too.
    """

    rss: int
    anonymous: int | None = None
    file: int | None = None
    device: int | None = None
    device_reserved: int | None = None
    shared: bool = False

    def merged(self, other: Peaks) -> Peaks:
        """The peaks of both intervals together: the larger of each pair."""
        return Peaks(
            max(self.rss, other.rss),
            _larger(self.anonymous, other.anonymous),
            _larger(self.file, other.file),
            _larger(self.device, other.device),
            _larger(self.device_reserved, other.device_reserved),
            self.shared or other.shared,
        )


class PeakSource(Call):
    """Hands out the peaks since the last `take`; `start` and `stop` open and close it, and run the sampling thread.

    `interval` is in seconds; `None` means no thread: only calls of `sample` and `take` are seen. `seen` is handed every
    sample, from whichever thread took it.
    """

    def __init__(self, interval: float | None = 0.01, seen: Callable[[Peaks], None] | None = None) -> None:
        super().__init__()
        self.exact_rss = _can_reset_high_water_mark()
        self._seen = seen
        self._interval = interval
        self._lock = new_lock()
        self._seen_so_far: Peaks | None = None
        self._end: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        tell_of_forks(self)

    def start(self) -> None:
        """Begin a first interval now."""
        self.thread = threading.get_ident()
        _MARKS.open(self)
        if self._interval is not None:
            self._end = SimpleQueue()  # and no event: an interrupt in the Python code of one leaves its lock held
            given = weakref.ref(self), self._interval, self._end
            self._thread = threading.Thread(target=_sample_until, args=given, name="lowtide-meter", daemon=True)
            self._thread.start()
        self.take()

    def stop(self) -> None:
        """End the sampling thread; peaks are not seen any more."""
        _MARKS.close(self)
        self._end.put(None)
        if self._thread is not None and self._thread.is_alive():  # an interrupt may have come into its start
            self._thread.join()
        self._thread = None

    def after_fork(self) -> None:
        """In a forked child nothing is sampled beside what runs."""
        self._thread = None

    def sample(self) -> None:
        """Look once at the memory in use."""
        now = _in_use()
        if self._seen is not None:
            self._seen(now)
        self.add(now)

    def add(self, peaks: Peaks) -> None:
        """Count these peaks in."""
        with self._lock:
            self._seen_so_far = peaks if self._seen_so_far is None else self._seen_so_far.merged(peaks)

    def take(self) -> Peaks:
        """The peaks since the last call; a new interval begins."""
        self.sample()
        return _MARKS.taken_for(self)

    def begin_anew(self) -> Peaks:
        """The peaks so far, which are forgotten."""
        with self._lock:
            peaks, self._seen_so_far = self._seen_so_far, None
        assert peaks is not None
        return peaks


def _sample_until(reference: weakref.ref[PeakSource], interval: float, end: SimpleQueue[None]) -> None:
    """Until the end, or until nobody keeps the source: an interrupt may keep it from being ended."""
    while True:
        try:
            end.get(timeout=interval)
        except Empty:
            source = reference()
            if source is None:
                return
            source.sample()
            del source
        else:
            return


class _Marks:
    """The owner of this process's marks, and the sources that are open."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._open: Calls[PeakSource] = Calls()

    def open(self, source: PeakSource) -> None:
        """Hand what the marks say to `source` too from now on."""
        with self._lock:
            self._open.begin(source)
            self._hand_on(Peaks(0))

    def close(self, source: PeakSource) -> None:
        """Hand it nothing more."""
        with self._lock:
            self._hand_on(Peaks(0))
            self._open.end(source)

    def taken_for(self, source: PeakSource) -> Peaks:
        """Begin the marks anew for all, and the interval of one source, whose peaks these are."""
        with self._lock:
            device, reserved = _take_device()
            marks = Peaks(_take_high_water_mark() if source.exact_rss else 0, device=device, device_reserved=reserved)
            source.add(marks)
            self._hand_on(marks)
            return source.begin_anew()

    def _hand_on(self, marks: Peaks) -> None:
        shared = len(self._open) > 1
        for source in self._open:
            source.add(replace(marks, shared=shared))


_MARKS = _Marks()


def _can_reset_high_water_mark() -> bool:
    return sys.platform == "linux" and os.access(_CLEAR_REFS, os.W_OK)


def _take_high_water_mark() -> int:
    """The mark, which begins anew at what is resident now.

    What another thread took and gave back between the look and the reset would be in no peak. `ctypes.PyDLL` keeps the
    interpreter's lock, so that no Python code runs between the two.
    """
    content, libc = ctypes.create_string_buffer(_LONGEST_STATUS), ctypes.PyDLL(None)
    with open(_STATUS, "rb", buffering=0) as status, open(_CLEAR_REFS, "wb", buffering=0) as reset:
        looked_at, reset_at = status.fileno(), reset.fileno()
        _ = libc.read(looked_at, content, _LONGEST_STATUS), libc.write(reset_at, b"5", 1)
    return _high_water_mark_in(content.value)


def _high_water_mark() -> int:
    return _high_water_mark_in(_STATUS.read_bytes())


def _high_water_mark_in(status: bytes) -> int:
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith(b"VmHWM:"))
    return int(kibibytes) * 1024


def process_peak() -> int | None:
    """Peak bytes of resident memory since this process began, or since a `PeakSource` last took it; None if unknown.

    From the kernel on Linux and on Windows; the other systems keep no such figure for one process.
    """
    if sys.platform == "linux":
        return _high_water_mark()
    return getattr(psutil.Process().memory_info(), "peak_wset", None)


def _in_use() -> Peaks:
    """Resident memory now; on Linux from `statm`: pages in all and those of files and shared memory."""
    if sys.platform != "linux":
        return Peaks(psutil.Process().memory_info().rss)
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident, shared = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in statm.read().split()[1:3])
    return Peaks(resident, resident - shared, shared)


def resident_memory() -> int:
    """Bytes of resident memory that this process uses now."""
    return _in_use().rss


def device_allocated() -> int | None:
    """Bytes that PyTorch has allocated now on all accelerators; None if it uses none."""
    using = accelerators_in_use()
    return sum(kind.allocated(device) for device, kind in using) if using else None


def accelerators_in_use() -> list[tuple[torch.device, Accelerator]]:
    """The devices that this process has begun to use, each with its kind; imports and begins nothing."""
    if not hasattr(getattr(sys.modules.get("torch"), "cuda", None), "is_initialized"):
        return []  # another thread may be about to import torch
    from lowtide.machine.accelerators import devices_in_use

    return devices_in_use()


def _take_device() -> tuple[int | None, int | None]:
    """Peak allocated and reserved bytes, summed over the devices, since the last call."""
    using = accelerators_in_use()
    peaks: list[tuple[int, int]] = []
    for device, kind in using:
        peaks.append(kind.peaks(device))
        kind.begin_peaks(device)
    return (sum(peak for peak, _ in peaks), sum(peak for _, peak in peaks)) if using else (None, None)


def _larger(first: int | None, second: int | None) -> int | None:
    return max((x for x in (first, second) if x is not None), default=None)
