"""The device that is measured: time by its own events, memory by what its allocator counts, and what is pinned."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.machine.accelerators import Accelerator, accelerator


@dataclass(frozen=True)
class Place:
    """A device of a kind. Where it is `tiny`, a stand-in, networks are so too."""

    device: torch.device
    kind: Accelerator
    tiny: bool = False

    @classmethod
    def of(cls, name: str, *, tiny: bool = False) -> Place:
        """The device of this name; raises `ValueError` for a CPU."""
        device, kind = torch.device(name), accelerator(name)
        if kind is None:
            raise ValueError(f"{name} is no accelerator.")
        return cls(torch.device(device.type, device.index or 0), kind, tiny)

    @property
    def dtype(self) -> torch.dtype:
        """What networks compute in: a CPU, which the stand-in is, is slow in 16 bits."""
        return torch.float32 if self.tiny else torch.bfloat16

    def tidy(self) -> None:
        """Have memory hold what is needed, and begin to count peaks."""
        gc.collect()
        self.kind.synchronize(self.device)
        self.kind.give_back(self.device)
        self.kind.begin_peaks(self.device)

    def series(self, call: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each of `count` calls, enqueued one behind the other, between events of the device."""
        events = [self.kind.timed_event(self.device)]
        for _ in range(count):
            call()
            events.append(self.kind.timed_event(self.device))
        self.kind.synchronize(self.device)
        return [first.elapsed_time(second) / 1000 for first, second in pairwise(events)]

    def seconds(self, call: Callable[[], Any], count: int = 5) -> float:
        """The median of such a series, after a call to warm up."""
        call()
        return statistics.median(self.series(call, count))

    def waited(self, call: Callable[[], Any]) -> float:
        """Seconds of a call on the host's clock, until the device has done it."""
        self.kind.synchronize(self.device)
        began = time.perf_counter()
        call()
        self.kind.synchronize(self.device)
        return time.perf_counter() - began

    def enqueued(self, call: Callable[[], Any], count: int = 3) -> float:
        """The median seconds until a call returns on the host, where the device was idle before."""
        taken = []
        for _ in range(count):
            self.kind.synchronize(self.device)
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        self.kind.synchronize(self.device)
        return statistics.median(taken)

    def link_rate(self) -> float:
        """Bytes a second from pinned memory to the device."""
        from lowtide.machine.disk_and_link import link_rates

        return 1e9 if self.tiny else link_rates(self.device)[0]


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators of this thread that compute or copy: about the kernels that are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass
class Pinned:
    """Host memory that was pinned: bytes, and seconds that it took, pages made for it among them."""

    nbytes: int = 0
    seconds: float = 0.0
    failed: int = 0


@contextmanager
def pinning(kind: Accelerator) -> Generator[Pinned]:
    """Count what is pinned meanwhile."""
    count, before = Pinned(), kind.pin

    def pin(flat: torch.Tensor, *rest: Any) -> bool:
        began = time.perf_counter()
        done = before(flat, *rest)
        count.seconds += time.perf_counter() - began
        count.nbytes += flat.numel() if done else 0
        count.failed += not done
        return done

    kind.__dict__["pin"] = pin
    try:
        yield count
    finally:
        del kind.__dict__["pin"]


@dataclass
class Peaks:
    """The most bytes that tensors took, and the most that the allocator held."""

    allocated: int = 0
    reserved: int = 0


@contextmanager
def lasting_peaks(place: Place) -> Generator[Peaks]:
    """The peaks of all that is done meanwhile, although observers of stages begin the device's anew in each."""
    found, begin = Peaks(), place.kind.begin_peaks

    def note(device: torch.device) -> None:
        allocated, reserved = place.kind.peaks(device)
        found.allocated, found.reserved = max(found.allocated, allocated), max(found.reserved, reserved)

    def begin_peaks(device: torch.device) -> None:
        note(device)
        begin(device)

    begin(place.device)
    place.kind.__dict__["begin_peaks"] = begin_peaks
    try:
        yield found
    finally:
        del place.kind.__dict__["begin_peaks"]
        note(place.device)


def host_peak() -> int:
    """Bytes of this process in host memory at most, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
