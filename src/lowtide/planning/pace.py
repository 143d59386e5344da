"""How long a stage takes: the time to compute, and the time to wait for weights.

With a unit loaded ahead, the next unit that streams is loaded while the present one, and the resident units after it,
compute. Beside an accelerator a queue of copies says so more exactly: see `lowtide.planning.copy_queue`. With nothing
loaded ahead, loads and computing add up. In the first call of a stage the order of units is not
known yet, so nothing is loaded ahead. Every plan reads every weight once, so the time to load a pipeline is left out,
and with it the load of resident units. Files are assumed to be in the system's memory, unless the run's weights
together exceed it: then the first call reads from the disk, and so do later calls if the weights that stream in each
call exceed the system's memory too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowtide.casting.casting import INT4, LAZILY_PACKED
from lowtide.memory.bounds import depth, places
from lowtide.memory.rule import Level
from lowtide.planning.copy_queue import Turn, behind_by_place, behind_in_ring, step_seconds
from lowtide.planning.options import Option, Streamed
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Component, UnitSize, Workload


@dataclass(frozen=True)
class Pace:
    """Seconds of a stage, and how long computing, the link and the disk alone would take."""

    seconds: float
    compute: float
    link: float
    disk: float


MULTIPLIED = (None, *LAZILY_PACKED)
"""Forms of weights that layers multiply by as they are."""


class _Load(NamedTuple):
    link: float
    disk: float
    seconds: float


def exceeds_cache(workload: Workload, rates: Rates) -> bool:
    """Whether the files of all weights are larger than what the system's memory can hold."""
    return sum(_file_bytes(component) for component in workload.components.values()) > rates.cache


def _file_bytes(component: Component) -> int:
    return sum(unit.resting for unit in component.units[Level.LEAF])


class Timing:
    """The loads of one option, from which the time of a stage follows; `shares` are its units' shares of computing.

    Options of the same units and rates may share their `loads`, which fill as they are needed.
    """

    def __init__(
        self,
        option: Option,
        rates: Rates,
        shares: list[float],
        loads: dict[tuple[Streamed, bool], _Load] | None = None,
        *,
        cold: bool,
    ) -> None:
        self.option, self.rates = option, rates
        self._shares, self._loads = shares, {} if loads is None else loads
        resting = sum(option.units[stream.place].resting for stream in option.streams if stream.on_disk)
        still_cold = resting > rates.cache
        self._first = self._later = [self._load(stream, cold=cold) for stream in option.streams]
        if still_cold != cold:
            self._later = [self._load(stream, cold=still_cold) for stream in option.streams]
        rule = option.plan.rule
        ring = [number for number, stream in enumerate(option.streams) if not option.units[stream.place].aside]
        self._ring = ring if rule is not None and rule.reach > 0 and len(ring) > 1 else []
        self._stays_for_stage = rule is not None and rule.level is Level.WHOLE

    def stage(self, calls: int, computing: float, visits: int = 1) -> Pace:
        """The pace of `calls` calls in `visits` stretches, each call with `computing` seconds of computing."""
        compute = computing + self._dequantizing()
        first = self._packing() + compute + sum(load.seconds for load in self._first)
        if self._stays_for_stage:
            later = visits - 1
            following = later * (compute + sum(load.seconds for load in self._later)) + (calls - visits) * compute
        else:
            later = calls - 1
            following = later * self._pipelined(compute)
        return Pace(
            first + following,
            calls * compute,
            sum(load.link for load in self._first) + later * sum(load.link for load in self._later),
            sum(load.disk for load in self._first) + later * sum(load.disk for load in self._later),
        )

    def _load(self, stream: Streamed, *, cold: bool) -> _Load:
        key = stream, cold
        if key not in self._loads:
            self._loads[key] = self._new_load(stream, cold=cold)
        return self._loads[key]

    def _new_load(self, stream: Streamed, *, cold: bool) -> _Load:
        unit, rates = self.option.units[stream.place], self.rates
        read = max(unit.nbytes, unit.resting) / rates.converted
        if rates.on_cpu:
            copied = stream.copied / max(1, unit.nbytes)
            link = copied * read + (1 - copied) * unit.nbytes / rates.link
        else:
            link = max(unit.nbytes / rates.link, read if stream.staged else 0.0)
        disk = unit.resting / rates.disk if cold and stream.on_disk else 0.0
        return _Load(link, disk, max(link, disk))

    def _dequantizing(self) -> float:
        casting, rates = self.option.plan.casting, self.rates
        if casting in MULTIPLIED:
            return 0.0
        rate = rates.dequantized_from_4 if casting == INT4 and rates.dequantized_from_4 else rates.dequantized
        return self.option.component.nbytes / rate

    def _packing(self) -> float:
        """Weights are packed in the first call."""
        option = self.option
        return option.component.nbytes / self.rates.packing if option.plan.casting in LAZILY_PACKED else 0.0

    def _pipelined(self, compute: float) -> float:
        """Seconds of a call in which the order of units is known: the next unit loads while those before it compute."""
        ring = set(self._ring)
        alone = sum(load.seconds for number, load in enumerate(self._later) if number not in ring)
        if not self._ring:
            return compute + alone
        places = [self.option.streams[number].place for number in self._ring]
        if not self.rates.on_cpu:
            return alone + self._queued(compute, places)
        loads = [self._later[number].seconds for number in self._ring]
        lost = self.rates.contention
        parts = self._between(places)
        following = [*loads[1:], loads[0]]
        pairs = zip(parts, following, strict=True)
        return alone + sum(max(compute * part + lost * load, load) for part, load in pairs)

    def _queued(self, compute: float, starts: list[int]) -> float:
        """The same beside an accelerator: its copies wait for nothing but each other and room on the device."""
        shares, ends = self._shares, [*starts[1:], len(self._shares)]
        turns = [
            Turn(self._later[number].seconds, compute * shares[place], compute * sum(shares[place + 1 : end]), behind)
            for number, place, end, behind in zip(self._ring, starts, ends, self._behind(), strict=True)
        ]
        return step_seconds(turns, compute * sum(shares[: starts[0]]))

    def _behind(self) -> list[int]:
        rule = self.option.plan.rule
        assert rule is not None
        if rule.prefetch_bytes is None:
            return behind_in_ring(len(self._ring), depth(rule.prefetch, several=False))
        streams = [self.option.streams[number] for number in self._ring]
        sizes = [self.option.units[stream.place].nbytes for stream in streams]
        return behind_by_place(places(sizes, max(rule.prefetch_bytes, *sizes)), sizes)

    def _between(self, places: list[int]) -> list[float]:
        """The share of computing from each of these units up to the next one; the first follows the last."""
        parts = [0.0] * len(places)
        numbers = dict(zip(places, range(len(places)), strict=True))
        present = len(places) - 1
        for place, share in enumerate(self._shares):
            present = numbers.get(place, present)
            parts[present] += share
        return parts


def shares_of(units: Sequence[UnitSize], rates: Rates) -> list[float]:
    """Each unit's share of a call's computing, or of its bytes where the work of units is not known."""
    seconds = [rates.seconds(unit.work) for unit in units]
    if sum(seconds) <= 0:
        seconds = [float(unit.nbytes) for unit in units]
    total = sum(seconds) or 1.0
    return [share / total for share in seconds]
