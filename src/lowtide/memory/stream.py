"""The stream: brings the weights of units to the device, a few ahead of computing, in a fixed number of buffers.

It alone knows copy streams, events, reader threads and mapped pages. On a CPU a weight in a file of its dtype is not
copied: mapped pages are read ahead and dropped behind. All others go through a ring of `depth` flat buffers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowtide.calls import Call, Calls
from lowtide.forks import new_lock, tell_of_forks
from lowtide.memory.bounds import ROWS_READ, Sizes, aligned, summed
from lowtide.memory.byte_ring import ByteRing
from lowtide.memory.ledger import Ledger
from lowtide.memory.reader import Reader
from lowtide.memory.ring import Ring
from lowtide.memory.store import DeviceRest, DiskRest, Window, copy_in_pieces
from lowtide.memory.unit import Buffer, Load, Unit
from lowtide.memory.weight import Weight

_numbers = itertools.count()


class Stream:
    """Loads units for one device; `prefetch` of them ahead, or with `prefetch_bytes` as many as find room in these.

    Shared by modules that do not run at the same time.

    Who calls its modules, or changes their rules, holds the `lock`. Locks of several are taken by their `number`.
    """

    def __init__(
        self, device: torch.device, *, prefetch: int = 1, prefetch_bytes: int | None = None, zero_copy: bool = True
    ) -> None:
        self.device = device
        self.zero_copy = zero_copy
        self.ledger = Ledger()
        self.lock = new_lock()
        self.number = next(_numbers)
        self.holders: Calls[Call] = Calls()
        self.looks_ahead = False
        """Whether units are loaded ahead: not where all of them work where they rest."""
        self._sizes: dict[Unit, Sizes] = {}
        self._live: dict[Unit, Load] = {}
        by_bytes = prefetch_bytes is not None
        self._ring = ByteRing(device, self.ledger, prefetch_bytes) if by_bytes else Ring(device, self.ledger, prefetch)
        self._windows: dict[Unit, Window] = {}
        self._aliases: dict[int, list[list[torch.Tensor]]] = {}
        self._reader = Reader()
        tell_of_forks(self)

    # ---- who uses it

    def admit(self, units: list[Unit]) -> None:
        """Serve these units from now on."""
        for unit in units:
            self._sizes[unit] = self._measure(unit)
        self._fit_ring()

    def dismiss(self, units: list[Unit]) -> None:
        """Serve these units no more; their weights are dropped."""
        for unit in units:
            self.drop(unit)
            self._forget_views(unit)
            self._sizes.pop(unit, None)
        self._fit_ring()

    def changed(self, unit: Unit) -> None:
        """A weight of `unit` rests elsewhere now."""
        self._forget_views(unit)
        if unit in self._sizes:
            self._sizes[unit] = self._measure(unit)

    def _forget_views(self, unit: Unit) -> None:
        self._aliases.pop(id(unit), None)
        self._windows.pop(unit, None)
        for buffer in self._ring.buffers:
            buffer.views.pop(id(unit), None)

    @contextmanager
    def held(self) -> Generator[None]:
        """While this lasts, whole modules stay loaded after their calls until another one needs the room."""
        this = Call()
        with self.lock:
            try:
                if not self.holders:
                    self.abandon(list(self._live))  # an interrupt may have come into the end of the last call
                self.holders.begin(this)
                yield
            finally:
                self.holders.end(this)
                if not self.holders:
                    self.rest()

    @property
    def bound(self) -> int:
        """Bytes that this stream's ledger never exceeds: residents, those in the ring, what stands aside."""
        sizes = self._sizes.copy()  # another thread may change them now
        alone = [size for unit, size in sizes.items() if unit.stays or unit.aside]
        streamed = {unit: size for unit, size in sizes.items() if not unit.stays and not unit.aside}
        return (summed(alone) + self._ring.most(streamed)).total

    def refuse_capture(self, units: Iterable[Unit]) -> None:
        """Before a call that needs `units`, or has them inside: a CPU captures nothing."""

    # ---- two verbs, and what they are made of

    def enter(self, unit: Unit) -> None:
        """A call that needs `unit` begins: have its weights in their slots, loaded if they are not.

        Entering is counted, so calls may be nested. Raises what `fetch` raises.
        """
        unit.count += 1
        if unit.load is None:
            replaced = [weight for weight in unit.weights if weight.disown_replaced()]
            if replaced:
                self.changed(unit)
            self.fetch(unit)

    def leave(self, unit: Unit, module: nn.Module, *, may_wait: bool) -> None:
        """One call of `module`, one of the unit's, has ended: drop the weights after the last.

        With `may_wait` they stay for the unit's other modules, or for another call of the whole. Weights never change,
        so leaving only drops; right also for a call whose `enter` did not come to its end.
        """
        unit.count = max(0, unit.count - 1)
        if unit.count == 0 and not unit.stays and not (may_wait and unit.waits_after(module)):
            self.drop(unit)

    def fetch(self, unit: Unit) -> None:
        """Have `unit` on the device and in its slots: wait for it, or load it now.

        Raises what reading raises (`CheckpointError`, `OSError`, `MemoryError`); nothing is in the slots then.
        """
        load = self._live.get(unit)
        if load is None:
            self._make_room(unit)
            load = self._start(unit)
        if load.buffer is not None or load.window_bytes:
            self._wait_for(load)
        unit.place(load, self._tensors(load))

    def _wait_for(self, load: Load) -> None:
        try:
            self._timed_wait(load)
        except BaseException:
            self.drop(load.unit)
            raise

    def _timed_wait(self, load: Load) -> None:
        began = time.perf_counter()
        self._wait(load)
        self.ledger.waited(load.unit.name, self._total(load.unit), time.perf_counter() - began)

    def _keep_changes(self, unit: Unit, weight: Weight, group: list[torch.Tensor]) -> None:
        before = weight.rest
        weight.adopt(group)
        if before is not weight.rest and isinstance(before, DiskRest) and before.works_in_place:
            Window([before]).let_go()
        unit.host = None
        self.changed(unit)

    def keep(self, unit: Unit) -> None:
        """Keep a loaded unit for good: if its bytes were copied to another device, they rest there and nowhere else."""
        load = self._live[unit]
        if self.device.type == "cpu" or load.buffer is None:
            return
        for weight, place in self._copies(unit):
            weight.rest = DeviceRest(load.buffer.flat[place : place + weight.nbytes], weight.origin)

    def look_ahead(self, upcoming: list[Unit]) -> None:
        """Start to load the units in `upcoming` that are not there; drop what was wrongly expected before."""
        upcoming = self._ring.ahead(upcoming, self._placed())
        for unit in [unit for unit in self._live if unit.load is None and unit not in upcoming]:
            self.drop(unit)
        for unit in upcoming:
            if unit not in self._live and self._ring.has_room(unit, self._placed()):
                self._start(unit)

    def drop(self, unit: Unit) -> None:
        """Take a unit off the device, whatever state it is in."""
        if unit.load is not None:
            unit.lift(self._keep_changes)
        load = self._live.get(unit)
        if load is None:
            return
        if load.reading is not None:
            load.reading.call_off()
        del self._live[unit]  # not before: its buffer is in use until then
        if load.buffer is not None or load.window_bytes:
            self._release(load)

    def rest(self) -> None:
        """Drop every unit that does not stay, and the buffers."""
        with self.lock:
            for unit in list(self._live):
                if not unit.stays:
                    self.drop(unit)
            self._ring.away(self._used())
            if not self._live:
                for window in self._windows.values():
                    window.let_go(edges=True)

    def settle(self, units: list[Unit]) -> None:
        """End a call of the module that these units belong to: those still loaded or awaited by nobody are dropped.

        What was loaded ahead for the next call stays, in its buffer.
        """
        for unit in units:
            if unit.load is not None and not unit.stays and not (unit.lingers and self.holders):
                self.drop(unit)

    def abandon(self, units: list[Unit]) -> None:
        """After a call of the module that these units belong to was cut short anywhere: drop them, count anew."""
        for unit in units:
            unit.count = 0
            if not unit.stays:
                self.drop(unit)
        self.ledger.recount(self._ring.held + sum(load.bytes_alone for load in self._live.values()))

    def after_fork(self) -> None:
        """In a forked child: drop what the parent's reader was to bring, and what calls of other threads had."""
        self._reader.begin_anew()
        for unit, load in list(self._live.items()):
            has_come, load.reading = load.reading is None or unit.load is load, None
            if not has_come:
                self.drop(unit)
        if not self.lock._is_owned():
            self.abandon(list(self._live))

    # ---- the work itself

    def _measure(self, unit: Unit) -> Sizes:
        copied = window = 0
        for weight in unit.weights:
            if not self._works_in_place(weight):
                copied += aligned(weight.nbytes)
            elif isinstance(weight.rest, DiskRest):
                window += min(weight.nbytes, ROWS_READ) if unit.by_rows else weight.nbytes
        return Sizes(copied, window)

    def _total(self, unit: Unit) -> int:
        return self._sizes[unit].total

    def _placed(self) -> list[Unit]:
        """Units that take a place in the ring or pages of a window: not those that work where they rest."""
        return [unit for unit in self._live if not unit.stays and not unit.aside and self._total(unit) > 0]

    def _make_room(self, unit: Unit) -> None:
        """Before `unit` is loaded: others leave, those loaded ahead first, then those that linger."""
        if unit.stays or unit.aside or self._total(unit) == 0:
            return
        idle = [live for live in self._live if live.count == 0 and not live.stays and not live.aside]
        for victim in sorted(idle, key=lambda live: live.load is not None):
            if self._ring.has_room(unit, self._placed()):
                return
            self.drop(victim)

    def _start(self, unit: Unit) -> Load:
        sizes = self._sizes[unit]
        buffer = self._buffer(unit, sizes.copied) if sizes.copied else None
        load = Load(unit, buffer, sizes.window)
        self.ledger.loaded(unit.name, sizes.total, load.window_bytes)
        self._live[unit] = load
        if sizes.total:
            self._begin(load)
        return load

    def _begin(self, load: Load) -> None:
        self._reader.ask(load, self._read)

    def _read(self, load: Load) -> None:
        """In the reader's thread: bring the bytes in."""
        for weight, place in self._copies(load.unit):
            assert load.buffer is not None
            target = load.buffer.flat[place : place + weight.nbytes]
            if self.device.type == "cpu":
                weight.rest.copy_into(target)
            else:
                copy_in_pieces(weight.rest, target)
        if not load.unit.by_rows:
            self._window(load.unit).bring_in()

    def _wait(self, load: Load) -> None:
        if load.reading is not None:
            load.reading.wait()

    def _release(self, load: Load) -> None:
        self._window(load.unit).let_go()
        self.ledger.give(load.bytes_alone)

    def _window(self, unit: Unit) -> Window:
        if unit not in self._windows:
            self._windows[unit] = Window(weight.rest for weight in unit.weights if self._has_window(weight))
        return self._windows[unit]

    def _works_in_place(self, weight: Weight) -> bool:
        return self.zero_copy and self.device.type == "cpu" and weight.rest.works_in_place

    def _has_window(self, weight: Weight) -> bool:
        return isinstance(weight.rest, DiskRest) and self._works_in_place(weight)

    def _copies(self, unit: Unit) -> Iterator[tuple[Weight, int]]:
        """The weights that are copied, and their places in the buffer."""
        place = 0
        for weight in unit.weights:
            if not self._works_in_place(weight):
                yield weight, place
                place += aligned(weight.nbytes)

    def _tensors(self, load: Load) -> list[list[torch.Tensor]]:
        """The tensors of a loaded unit, made once for each buffer that it comes to lie in."""
        tensors = load.buffer.views if load.buffer is not None else self._aliases
        if id(load.unit) not in tensors:
            flats: dict[Weight, torch.Tensor] = {}
            for weight, place in self._copies(load.unit):
                assert load.buffer is not None
                flats[weight] = load.buffer.flat[place : place + weight.nbytes]
            for weight in load.unit.weights:
                if weight not in flats:
                    flats[weight] = weight.rest.window() if self._has_window(weight) else weight.rest.on_host()
            tensors[id(load.unit)] = [weight.tensors(flats[weight]) for weight in load.unit.weights]
        return tensors[id(load.unit)]

    # ---- buffers

    def _buffer(self, unit: Unit, nbytes: int) -> Buffer:
        buffer = None if unit.aside or unit.stays else self._ring.free(unit, nbytes, self._used())
        return self._ring.new(nbytes) if buffer is None else buffer

    def _used(self) -> set[int]:
        return {id(load.buffer) for load in self._live.values()}

    def _fit_ring(self) -> None:
        streamed = {unit: size for unit, size in self._sizes.items() if not unit.stays and not unit.aside}
        self.looks_ahead = self._ring.looks_ahead and any(size.total for size in streamed.values())
        if not self._ring.fits(streamed):
            for unit in list(self._live):
                if not unit.stays:
                    self.drop(unit)
            self._ring.away(self._used())
        self._ring.fit(streamed)
