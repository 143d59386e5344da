"""A ring that is limited by bytes: one run of memory, in which small units leave room for more of them ahead."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch

from lowtide.memory.bounds import Sizes, largest, places, rooms
from lowtide.memory.ledger import Ledger
from lowtide.memory.ring import Ring, several
from lowtide.memory.unit import Buffer, Unit


class ByteRing(Ring):
    """Has one place for each unit in a run of `prefetch_bytes`, and a buffer there that is always the same.

    Places follow each other in the order of the units, and begin again where the run ends. A unit is loaded ahead if no
    unit in use, or wanted before it, has a place that overlaps with its own.
    """

    def __init__(self, device: torch.device, ledger: Ledger, prefetch_bytes: int) -> None:
        super().__init__(device, ledger, prefetch=0)
        self.prefetch_bytes = prefetch_bytes
        self._streamed: dict[Unit, Sizes] = {}
        self._room = Sizes()
        self._places: dict[Unit, range] = {}
        self._overlaps: dict[Unit, frozenset[Unit]] = {}
        self._run: Buffer | None = None
        self._by_unit: dict[Unit, Buffer] = {}
        self._count = itertools.count(1)

    # ---- for which units

    @property
    def looks_ahead(self) -> bool:
        """It does, where there is room."""
        return True

    def fits(self, streamed: Mapping[Unit, Sizes]) -> bool:
        """Whether these are the same units, in the same order, with the same sizes."""
        return list(streamed.items()) == list(self._streamed.items())

    def fit(self, streamed: Mapping[Unit, Sizes]) -> None:
        """Give each unit its place."""
        if self.fits(streamed):
            return
        self._streamed, self._room = dict(streamed), rooms(streamed.values(), self.prefetch_bytes)
        copied = [sizes.copied for sizes in streamed.values()]
        starts = places(copied, self._room.copied)
        self._places = {
            unit: range(start, start + size) for unit, start, size in zip(streamed, starts, copied, strict=True)
        }
        self._overlaps = {}

    def most(self, streamed: Mapping[Unit, Sizes]) -> Sizes:
        """The run, and what comes beside it: what has grown since it had its place, and one more between modules."""
        beside = [size for unit, size in streamed.items() if size != self._streamed.get(unit)]
        more = largest(streamed.values()) if several(streamed) else Sizes()
        return sum(beside, rooms(streamed.values(), self.prefetch_bytes)) + more

    def has_room(self, unit: Unit, placed: Collection[Unit]) -> bool:
        """Whether nothing has a place that overlaps with its own, and windows stay within their bytes."""
        window = self._window(unit)
        return self._overlapping(unit).isdisjoint(placed) and (
            not window or window + sum(map(self._window, placed)) <= self._room.window
        )

    def ahead(self, upcoming: list[Unit], placed: Collection[Unit]) -> list[Unit]:
        """Those that find room beside what is in use, up to the first that does not: it comes before the others."""
        taken = {unit for unit in placed if unit.load is not None}
        chosen: list[Unit] = []
        for unit in upcoming:
            if unit in taken or not self.has_room(unit, taken):
                break
            taken.add(unit)
            chosen.append(unit)
        return chosen

    def _window(self, unit: Unit) -> int:
        return self._streamed[unit].window if unit in self._streamed else 0

    def _overlapping(self, unit: Unit) -> frozenset[Unit]:
        """Those whose places overlap with its own, which is among them if it has one."""
        if unit not in self._overlaps:
            place = self._places.get(unit, range(0))
            self._overlaps[unit] = frozenset(other for other in self._places if _overlap(place, self._places[other]))
        return self._overlaps[unit]

    # ---- buffers

    def free(self, unit: Unit, nbytes: int, used: set[int]) -> Buffer | None:
        """Its buffer; None where that is too small, or what overlaps with it is in use."""
        place = self._places.get(unit, range(0))
        others = (self._by_unit.get(other) for other in self._overlapping(unit))
        if nbytes > len(place) or any(id(other) in used for other in others if other is not None):
            return None
        if self._run is None:
            self._run = self.new(self._room.copied, in_ring=True)
        if unit not in self._by_unit:
            self._by_unit[unit] = Buffer(self._run.flat[place.start : place.stop], in_ring=True)
            self.buffers.append(self._by_unit[unit])
        return self._by_unit[unit]

    def freed(self, unit: Unit, buffer: Buffer) -> Any:
        """The event behind the last use of its memory, by whichever unit."""
        if self._by_unit.get(unit) is not buffer:
            return buffer.free
        others = (self._by_unit.get(other) for other in self._overlapping(unit))
        return max((other for other in others if other is not None), key=lambda other: other.turn).free

    def left(self, buffer: Buffer, event: Any) -> None:
        """Note the event behind its last use, and that it is the last of all until now."""
        super().left(buffer, event)
        buffer.turn = next(self._count)

    @property
    def held(self) -> int:
        """Bytes of the run."""
        return 0 if self._run is None else self._run.flat.numel()

    def away(self, used: set[int]) -> None:
        """Let go of the run, unless something in it is in use."""
        if self._run is not None and not any(id(buffer) in used for buffer in self.buffers):
            nbytes, self._run = self.held, None
            self._by_unit.clear()
            self.buffers.clear()
            self.ledger.give(nbytes)


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)
