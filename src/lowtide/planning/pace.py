"""How long a stage takes: computing, and what it waits for weights on their way.

With a unit loaded ahead, the load of the next unit that streams goes on while the present one and the residents after
it compute; without, loads and computing add up. In the first call of a stage the order of units is not known yet, so
nothing is loaded ahead. Every plan reads every weight once, so loading a pipeline is left out, and with it the load
of what stays on the device. Files are taken to be in the system's memory, unless the run's weights together exceed what
it holds: then the first call reads from the disk, and later ones too where what streams in each exceeds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.memory.rule import Level
from lowtide.planning.options import Option, Streamed
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Component, UnitSize, Workload


@dataclass(frozen=True)
class Pace:
    """Seconds of a stage, and how long each part alone would take."""

    seconds: float
    compute: float
    link: float
    disk: float


@dataclass(frozen=True)
class _Load:
    link: float
    disk: float

    @property
    def seconds(self) -> float:
        return max(self.link, self.disk)


def exceeds_cache(workload: Workload, rates: Rates) -> bool:
    """Whether the system's memory cannot hold the files of all weights."""
    return sum(_file_bytes(component) for component in workload.components.values()) > rates.cache


def _file_bytes(component: Component) -> int:
    return sum(unit.resting for unit in component.units[Level.LEAF])


class Timing:
    """The loads of one option, from which the time of any stage follows; `shares` are those of its units."""

    def __init__(self, option: Option, rates: Rates, shares: list[float], *, cold: bool) -> None:
        self.option, self.rates = option, rates
        self._shares = shares
        resting = sum(option.units[one.place].resting for one in option.streams if one.on_disk)
        still_cold = resting > rates.cache
        self._first = [self._load(one, cold=cold) for one in option.streams]
        self._later = (
            self._first if still_cold == cold else [self._load(one, cold=still_cold) for one in option.streams]
        )
        rule = option.plan.rule
        ring = [number for number, one in enumerate(option.streams) if not option.units[one.place].aside]
        self._ring = ring if rule is not None and rule.prefetch > 0 and len(ring) > 1 else []
        self._lingers = rule is not None and rule.level is Level.WHOLE

    def stage(self, calls: int, computing: float) -> Pace:
        """What `calls` calls take that compute so many seconds each."""
        compute = computing + self._dequantizing()
        later = 0 if self._lingers else calls - 1
        first = compute + sum(load.seconds for load in self._first)
        following = compute if self._lingers else self._pipelined(compute)
        return Pace(
            first + (calls - 1) * following,
            calls * compute,
            sum(load.link for load in self._first) + later * sum(load.link for load in self._later),
            sum(load.disk for load in self._first) + later * sum(load.disk for load in self._later),
        )

    def _load(self, stream: Streamed, *, cold: bool) -> _Load:
        unit, rates = self.option.units[stream.place], self.rates
        read = max(unit.nbytes, unit.resting) / rates.converted
        if rates.on_cpu:
            copied = stream.copied / max(1, unit.nbytes)
            link = copied * read + (1 - copied) * unit.nbytes / rates.link
        else:
            link = max(unit.nbytes / rates.link, read if stream.on_disk else 0.0)
        return _Load(link, unit.resting / rates.disk if cold and stream.on_disk else 0.0)

    def _dequantizing(self) -> float:
        option = self.option
        return 0.0 if option.plan.casting is None else option.component.nbytes / self.rates.dequantized

    def _pipelined(self, compute: float) -> float:
        """Seconds of one call that knows the order: each load beside the computing since the load before it."""
        alone = sum(load.seconds for number, load in enumerate(self._later) if number not in set(self._ring))
        if not self._ring:
            return compute + alone
        places = [self.option.streams[number].place for number in self._ring]
        loads = [self._later[number].seconds for number in self._ring]
        lost = self.rates.contention
        parts = self._between(places)
        following = [*loads[1:], loads[0]]
        pairs = zip(parts, following, strict=True)
        return alone + sum(max(compute * part + lost * load, load) for part, load in pairs)

    def _between(self, places: list[int]) -> list[float]:
        """Shares of computing from each of these units up to the next one, around the circle."""
        parts = [0.0] * len(places)
        bounds = dict(zip(places, range(len(places)), strict=True))
        present = len(places) - 1
        for place, share in enumerate(self._shares):
            present = bounds.get(place, present)
            parts[present] += share
        return parts


def shares_of(units: Sequence[UnitSize], rates: Rates) -> list[float]:
    """Of a call's computing, the part that each unit's weights have; by bytes where that is unknown."""
    seconds = [rates.seconds(unit.work) for unit in units]
    if sum(seconds) <= 0:
        seconds = [float(unit.nbytes) for unit in units]
    total = sum(seconds) or 1.0
    return [one / total for one in seconds]
