"""What orders the streams of the stand-in: a watch over which stream has waited for which, as a vector of clocks.

`tests.sim_device` looks at one stream that computes and one that copies. Here every stream is one of several, as where
somebody computes under `torch.cuda.stream(other)`. A write must come behind all uses of its memory by other streams, a
read behind the last write, and memory goes back to the stream that it was allocated on: that one's next use of it comes
behind nothing but what it has waited for, so all other uses must be among that. What the host waits for is behind all.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests import sim_device, sim_tensor
from tests.sim_device import CopyStream, Device, Event, Home, Sim, SimStream
from tests.sim_tensor import SimTensor, flat_tensors

from lowtide.memory.read_only import written

Clocks = dict[SimStream, int]
"""How far each stream has come."""


FAR = 2**62


class Uses:
    """Who used an allocation, how far they had come then, and who filled it last. `owner` is whose memory it is."""

    def __init__(self, owner: SimStream) -> None:
        self.owner = owner
        self.at: Clocks = {}
        self.filled: Clocks = {}


class Order:
    """The clocks of all streams."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.now: Clocks = {}
        self.seen: dict[SimStream, Clocks] = {}
        self.host: Clocks = {}
        self.uses: weakref.WeakKeyDictionary[Home, Uses] = weakref.WeakKeyDictionary()

    def stream(self, device: Device) -> SimStream:
        """The one that is asked for what is asked for now."""
        return self.sim.computing(device.name)

    def moved(self, stream: SimStream) -> int:
        self.now[stream] = self.now.get(stream, 0) + 1
        return self.now[stream]

    def recorded(self, stream: SimStream) -> Clocks:
        """All that is behind what a stream does now."""
        return {**self.seen.get(stream, {}), stream: self.now.get(stream, 0)}

    def waits(self, seen: Clocks, clocks: Clocks) -> None:
        for stream, place in list(clocks.items()):
            seen[stream] = max(seen.get(stream, 0), place)

    def unseen(self, stream: SimStream, clocks: Clocks) -> bool:
        """Whether something is left that a stream has not waited for."""
        seen = self.seen.get(stream, {})
        others = ((other, place) for other, place in clocks.items() if other is not stream)
        return any(max(seen.get(other, 0), self.host.get(other, 0)) < place for other, place in others)

    def allocated(self, home: Home) -> None:
        uses = self.uses[home] = Uses(self.stream(home.device))
        weakref.finalize(home, self.released, home.device, uses).atexit = False

    def released(self, device: Device, uses: Uses) -> None:
        if self.unseen(uses.owner, uses.at):
            device.counts.problems.append("memory is released, and its stream has not waited for another that uses it")

    def read(self, home: Home, stream: SimStream, func: Any) -> None:
        uses = self.uses.get(home)
        if uses is not None:
            if self.unseen(stream, uses.filled):
                home.device.counts.problems.append(f"{func} reads memory that another stream has yet to fill")
            uses.at[stream] = self.now[stream]

    def write(self, home: Home, stream: SimStream, func: Any) -> None:
        uses = self.uses.get(home)
        if uses is not None:
            if self.unseen(stream, uses.at):
                home.device.counts.problems.append(f"{func} writes to memory that another stream uses")
            uses.filled = {stream: self.now[stream]}
            uses.at[stream] = self.now[stream]

    def done(self, func: Any, args: Any, kwargs: Any, made: Any, *, host_waited: bool) -> None:
        """An operator was asked for."""
        given = [x for x in flat_tensors((args, kwargs)) if isinstance(x, SimTensor)]
        if func.is_view or not given:
            return
        stream = self.stream(given[0].home.device)
        self.moved(stream)
        targets = {id(x.home): x.home for x in written(func, args, kwargs) if isinstance(x, SimTensor)}
        for x in given:
            if id(x.home) not in targets:
                self.read(x.home, stream, func)
        for home in (*targets.values(), *(x.home for x in flat_tensors(made) if isinstance(x, SimTensor))):
            self.write(home, stream, func)
        if host_waited:
            self.waits(self.host, self.recorded(stream))


@contextmanager
def ordered(sim: Sim) -> Generator[Order]:
    """Watch the order of a stand-in's streams; what is wrong is among its problems."""
    order = Order(sim)
    before = {name: getattr(owner, name) for owner, name in ((sim_tensor, "dispatched"), (Sim, "synchronize"))}
    recording, synchronizing, making = SimStream.record_event, Event.synchronize, Home.__init__

    def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        waits = [len(device.counts.waits) for device in sim.devices]
        made = before["dispatched"](func, args, kwargs)
        host_waited = waits != [len(device.counts.waits) for device in sim.devices]
        order.done(func, args, kwargs, made, host_waited=host_waited)
        return made

    def record_event(self: SimStream) -> Event:
        event = recording(self)
        event.behind = order.recorded(self)  # type: ignore[attr-defined]
        return event

    def waiting(kind: type[SimStream]) -> Any:
        wait = kind.wait_event

        def wait_event(self: SimStream, event: Event) -> None:
            wait(self, event)
            order.waits(order.seen.setdefault(self, {}), getattr(event, "behind", {}))
            if isinstance(self, CopyStream):
                self.seen = FAR  # the stand-in's own look at it is for one stream that computes

        return wait_event

    def synchronize(self: Event) -> None:
        synchronizing(self)
        order.waits(order.host, getattr(self, "behind", {}))

    def synchronize_all(self: Sim, device: torch.device) -> None:
        before["synchronize"](self, device)
        order.waits(order.host, order.now)

    def made(self: Home, device: Device, nbytes: int) -> None:
        making(self, device, nbytes)
        order.allocated(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim_tensor, "dispatched", dispatched)
        patch.setattr(SimStream, "record_event", record_event)
        patch.setattr(CopyStream, "wait_event", waiting(CopyStream))
        patch.setattr(SimStream, "wait_event", waiting(SimStream))
        patch.setattr(Event, "synchronize", synchronize)
        patch.setattr(Sim, "synchronize", synchronize_all)
        patch.setattr(sim_device.Home, "__init__", made)
        yield order
        for device in sim.devices:  # the end of the process: what was never waited for happens all the same
            for copier in device.copiers:
                copier.run_until(copier.place)


def other_stream(sim: Sim, device: torch.device) -> SimStream:
    """A stream of a user's own, to compute under: `with sim.on(device, stream)`."""
    return SimStream(sim.of(device))
