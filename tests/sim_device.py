"""A stand-in for an accelerator, as hostile as one may be: a kind of device of PyTorch's, whose tensors are on the CPU.

`sim:0` and `sim:1` are real devices: a tensor of one meets neither those of the other nor those of the CPU. Computing
happens at once, and copies on a copy stream as late as they may ("late": only when somebody waits for an event that
was recorded behind them) or at once ("early"). New memory, and a buffer of the engine that is given back, hold NaN.
Noted as `problems` are: a copy into memory that was not made to wait for the memory's last use, and computing with
memory that a copy which nobody waited for has yet to fill. Counted are bytes, launches, copies, what waits on the
host, and bytes that are pinned; allocations, copies and pins fail on order. Time is counted, too: each stream has a
clock that launches and bytes move on, and waiting for an event moves it on to the event's. The host takes none.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lowtide.machine.device_kinds import Accelerator, DeviceMemory

GRAIN = 512


GENERATORS = [torch.Generator().manual_seed(index) for index in range(2)]
"""Each device's own, which draws where none is given: not the CPU's."""


class _Module:
    """What PyTorch asks of a kind of device."""

    is_initialized = is_available = staticmethod(lambda: False)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)

    def manual_seed_all(self, seed: int) -> None:
        for generator in GENERATORS:
            generator.manual_seed(seed)

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return GENERATORS[device.index or 0].get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        GENERATORS[device.index or 0].set_state(state)


_setup_privateuseone_for_python_backend("sim", _Module())


@dataclass
class Counts:
    """What a device was asked for; `problems` are what a real one would have punished, sometimes."""

    problems: list[str] = field(default_factory=list)
    launches: int = 0
    copies: int = 0
    waits: list[str] = field(default_factory=list)
    allocations: int = 0


class Home:
    """One allocation: who used each part of it last, and the parts that copies have yet to fill."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = -(-nbytes // GRAIN) * GRAIN
        self.pending: list[range] = []
        self.device = device
        device.take(self.nbytes)
        self.uses = {range(self.nbytes): device.computing.record()}
        weakref.finalize(self, device.give, self.nbytes).atexit = False

    def is_pending(self, part: range) -> bool:
        return any(meet(part, other) for other in self.pending)

    def last_use(self, part: range) -> int:
        return max((place for other, place in self.uses.items() if meet(part, other)), default=0)


def meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


class Event:
    def __init__(self, stream: Any, place: int) -> None:
        self.stream, self.place, self.seconds = stream, place, stream.clock

    def query(self) -> bool:
        return True  # the host takes no time: whatever it asks for, the device is past

    def synchronize(self) -> None:
        self.stream.run_until(self.place)

    def elapsed_time(self, later: Event) -> float:
        return (later.seconds - self.seconds) * 1000


class SimStream:
    """Computing: it does all at once. `place` counts what it was asked for, `clock` the seconds that this takes."""

    def __init__(self, device: Device) -> None:
        self.device, self.place, self.clock = device, 0, 0.0

    def record(self) -> int:
        self.place += 1
        return self.place

    def record_event(self) -> Event:
        return Event(self, self.record())

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event), "wait for no event"
        event.stream.run_until(event.place)
        self.clock = max(self.clock, event.seconds)

    def wait_stream(self, other: SimStream) -> None:
        self.wait_event(other.record_event())

    def run_until(self, place: int) -> None:
        pass

    def __ne__(self, other: object) -> bool:
        return other is not None and self is not other  # as those of PyTorch


class CopyStream(SimStream):
    """Copies, in a queue. `seen` is how far it was made to wait for computing."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.queue: list[tuple[int, Callable[[], None], torch.Tensor]] = []
        self.seen = 0

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event), "wait for no event"
        self.seen = max(self.seen, event.place) if event.stream is self.device.computing else self.seen
        self.clock = max(self.clock, event.seconds)

    @property
    def sources(self) -> list[torch.Tensor]:
        """What copies that are yet to be made read."""
        return [source for _, _, source in self.queue]

    def push(self, do: Callable[[], None], source: torch.Tensor) -> int:
        with self.device.lock:
            self.clock += source.numel() * source.itemsize * self.device.sim.byte_seconds
            place = self.record()
            self.queue.append((place, do, source))
        if self.device.sim.early:
            self.run_until(place)
        return place

    def run_until(self, place: int) -> None:
        with self.device.lock:
            while self.queue and self.queue[0][0] <= place:
                self.queue.pop(0)[1]()


class Device:
    """One device: its memory, its streams, and what it counts."""

    def __init__(self, sim: Sim, index: int) -> None:
        self.sim, self.name = sim, torch.device("sim", index)
        self.lock = threading.RLock()
        self.counts = Counts()
        self.allocated = self.peak = 0
        self.limit = 2**40
        self.computing = SimStream(self)
        self.copiers: list[CopyStream] = []

    def take(self, nbytes: int) -> None:
        with self.lock:
            self.sim.may_fail("allocation")
            if nbytes and self.allocated + nbytes > self.limit:
                raise torch.OutOfMemoryError(f"SIM out of memory. Tried to allocate {nbytes} bytes.")
            self.counts.allocations += 1
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)

    def give(self, nbytes: int) -> None:
        with self.lock:
            self.allocated -= nbytes


class Sim(Accelerator):
    """The kind of device. `early` copies are done at once; `unified` ones have the host's memory."""

    reads_at_once = True

    def __init__(self, *, early: bool, pins: bool = True, unified: bool = False, streams: bool = True) -> None:
        super().__init__("sim")
        self.has_streams = streams
        self.captures = False
        self.launch_seconds, self.byte_seconds = 1e-6, 1e-9
        self.early, self.registers, self.unified = early, pins, unified
        self.devices = [Device(self, 0), Device(self, 1)]
        self.registered: dict[int, int] = {}
        self.failing: dict[str, list[BaseException | None]] = {}
        self._here = threading.local()

    def fail(self, what: str, error: BaseException, *, after: int = 0) -> None:
        """Have an "allocation", a "copy" or a "pin" raise this, after so many that go well.

        A pin does not raise it itself, as none of CUDA's does: the next launch of its thread does.
        """
        self.failing[what] = [None] * after + [error]

    def may_fail(self, what: str) -> None:
        planned = self.failing.get(what)
        error = planned.pop(0) if planned else None
        if error is not None:
            raise error

    def launch(self) -> None:
        """A launch raises what a failed call of the runtime left to its thread, and clears it."""
        error, self._here.error = getattr(self._here, "error", None), None
        if error is not None:
            raise error

    @property
    def problems(self) -> list[str]:
        return [problem for device in self.devices for problem in device.counts.problems]

    def of(self, device: torch.device) -> Device:
        return self.devices[device.index or 0]

    # ---- as the library asks

    def count(self) -> int:
        return 2

    def is_in_use(self, device: torch.device) -> bool:
        return self.of(device).allocated > 0

    def name(self, device: torch.device) -> str:
        return "Stand-in"

    def shares_host_memory(self, device: torch.device) -> bool:
        return self.unified

    def memory(self, device: torch.device) -> DeviceMemory:
        one = self.of(device)
        return DeviceMemory(one.limit - one.allocated, one.limit)

    def allocated(self, device: torch.device) -> int:
        return self.of(device).allocated

    def peaks(self, device: torch.device) -> tuple[int, int]:
        return self.of(device).peak, self.of(device).peak

    def begin_peaks(self, device: torch.device) -> None:
        self.of(device).peak = self.of(device).allocated

    def give_back(self, device: torch.device) -> None:
        pass

    def limit(self, device: torch.device, nbytes: int | None) -> None:
        self.of(device).limit = 2**40 if nbytes is None else nbytes

    def synchronize(self, device: torch.device) -> None:
        one = self.of(device)
        one.counts.waits.append("synchronize")
        for copier in one.copiers:
            copier.run_until(copier.place)

    def new_stream(self, device: torch.device) -> CopyStream:
        self.of(device).copiers.append(CopyStream(self.of(device)))
        return self.of(device).copiers[-1]

    def computing(self, device: torch.device) -> SimStream:
        return self.chosen(self.of(device)) or self.of(device).computing

    def chosen(self, device: Device) -> SimStream | None:
        stream = getattr(self._here, "stream", None)
        return stream if stream is not None and stream.device is device else None

    def is_capturing(self, device: torch.device) -> bool:
        return self.captures

    def timed_event(self, device: torch.device) -> Event:
        return self.computing(device).record_event()

    @contextmanager
    def on(self, device: torch.device, stream: Any = None) -> Generator[None]:
        before, self._here.stream = getattr(self._here, "stream", None), stream
        try:
            yield
        finally:
            self._here.stream = before

    @property
    def pinned(self) -> int:
        return sum(self.registered.values())

    def _register(self, flat: torch.Tensor) -> bool:
        assert flat.data_ptr() not in self.registered, "pinned twice"
        try:
            self.may_fail("pin")
        except BaseException as error:
            self._here.error = error
            return False
        self.registered[flat.data_ptr()] = flat.numel()
        return True

    def _unregister(self, flat: torch.Tensor) -> bool:
        sources = [source for device in self.devices for copier in device.copiers for source in copier.sources]
        if any(source.untyped_storage().data_ptr() == flat.data_ptr() for source in sources):
            self.devices[0].counts.problems.append("memory is unpinned, and a copy from it has yet to be made")
        if self.registered.pop(flat.data_ptr(), None) is None:
            self._here.error = RuntimeError("CUDA error: part or all of the requested memory range is not registered")
            return False
        return True
