"""What can be done with one component's weights: each option with the bytes it takes, between calls and in them.

Resident; whole for a stage (model offload); block by block, each number of blocks that `spread` would keep staying on
the device; leaf by leaf; with one unit loaded ahead or none. On a CPU weights rest in their files, on a GPU in host
memory or, where that is limited, partly or all in files. 8-bit weights are in no file: on a CPU they stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowtide.memory.bounds import STAGE_BYTES, Sizes, bound, depth, spread, summed, within
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.plan import ComponentPlan
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Component, UnitSize

HOST_SHARES = (1.0, 0.5, 0.0)
"""Of a component's streamed weights, those that rest in a GPU's host memory: all, or less where it is scarce."""
STEPS = 2
"""Sizes of `resident_bytes` that are looked at for each unit."""


@dataclass(frozen=True)
class Streamed:
    """One unit on its way: how many bytes are `copied`, not mapped as they lie, and whether it comes from a file
    (`on_disk`).
    """

    place: int
    copied: int
    on_disk: bool


@dataclass(frozen=True)
class Option:
    """One way to hold a component.

    `kept` bytes stay between calls, `working` are the most in calls, `leaf` of which one layer's dequantized numbers.
    `host` bytes rest in host memory of a GPU, `spilled` in a temporary file. `streams` come and go.
    """

    component: Component
    plan: ComponentPlan
    units: tuple[UnitSize, ...]
    streams: tuple[Streamed, ...]
    kept: Sizes
    working: Sizes
    leaf: int = 0
    host: int = 0
    spilled: int = 0

    @property
    def complexity(self) -> int:
        """How far it is from simply resident: of equally fast options the simplest is best."""
        rule = self.plan.rule
        if rule is None:
            return 0
        return 1 + 2 * list(Level).index(rule.level) + (rule.prefetch == 0) + any(one.on_disk for one in self.streams)


def options(component: Component, rates: Rates, castings: Sequence[str], *, scarce_host: bool) -> list[Option]:
    """All options for a component; `scarce_host` adds those that take less of a GPU's host memory."""
    found: list[Option] = []
    for casting in (None, *[one for one in castings if one in component.castings]):
        found.append(_resident(component, rates, casting))
        if not (rates.on_cpu and casting):
            found += _offloaded(component, rates, casting, scarce_host=scarce_host)
    return found


def units_of(component: Component, level: Level, casting: str | None) -> tuple[UnitSize, ...]:
    """The units of a component at a level, its weights in the form named."""
    return (component.units if casting is None else component.castings[casting])[level]


def _resident(component: Component, rates: Rates, casting: str | None) -> Option:
    units = units_of(component, Level.LEAF, casting)
    kept = summed(_resident_size(unit, _copied_to_stay(component, unit, rates)) for unit in units)
    leaf = _leaf(units, casting)
    plan = ComponentPlan(None, casting, kept.total, kept.total, len(units), len(units))
    return Option(component, plan, units, (), kept, kept + Sizes(leaf), leaf)


def _offloaded(component: Component, rates: Rates, casting: str | None, *, scarce_host: bool) -> Iterator[Option]:
    shares = HOST_SHARES if scarce_host and casting is None and component.in_file else HOST_SHARES[:1]
    for level, prefetch in ((Level.WHOLE, 0), (Level.BLOCK, 1), (Level.BLOCK, 0), (Level.LEAF, 1), (Level.LEAF, 0)):
        sizes = [unit.nbytes for unit in units_of(component, level, casting)]
        for resident in _resident_sizes(sizes) if level is Level.BLOCK else [0]:
            rule = Rule(level, prefetch=prefetch, resident_bytes=resident)
            if rates.on_cpu:
                yield under_rule(component, rates, replace(rule, rest=Tier.DISK, spill=not component.in_file), casting)
                continue
            streamed = sum(sizes) - sum(sizes[place] for place in spread(sizes, resident))
            for share in shares:
                limit = None if share == 1 else int(streamed * share)
                rest = replace(rule, host_bytes=limit) if share else replace(rule, rest=Tier.DISK)
                yield under_rule(component, rates, rest, casting)


def _resident_sizes(sizes: list[int]) -> list[int]:
    """Values of `resident_bytes` with which other units stay, the first of them none."""
    total, count = sum(sizes), STEPS * len(sizes)
    found: dict[tuple[int, ...], int] = {}
    for step in range(count):
        budget = -(-total * step // count)
        found.setdefault(tuple(spread(sizes, budget)), budget)
    return list(found.values())


def under_rule(component: Component, rates: Rates, rule: Rule, casting: str | None) -> Option:
    """What a rule makes of a component."""
    units = units_of(component, rule.level, casting)
    staying = set(spread([unit.nbytes for unit in units], rule.resident_bytes))
    places = [place for place in range(len(units)) if place not in staying]
    on_host = within([units[place].nbytes for place in places], rule.host_bytes) if rule.rest is Tier.HOST else None
    streamed = tuple(
        Streamed(
            place, _copied_each_time(component, units[place], rates), on_disk=on_host is None or not on_host[number]
        )
        for number, place in enumerate(places)
    )
    streams = tuple(one for one in streamed if units[one.place].called)
    kept = summed(_size(units[place], _copied_to_stay(component, units[place], rates)) for place in staying)
    ring = [_size(units[one.place], one.copied) for one in streamed if not units[one.place].aside]
    aside = [_size(units[one.place], one.copied) for one in streamed if units[one.place].aside]
    several = any(units[one.place].modules > 1 for one in streamed if not units[one.place].aside)
    leaf = _leaf(units, casting)
    working = bound([kept], ring, aside, depth(rule.prefetch, several=several)) + Sizes(leaf)
    resting = sum(units[one.place].nbytes for one in streamed if not one.on_disk)
    staging = 2 * STAGE_BYTES if not rates.on_cpu and (staying or any(one.on_disk for one in streamed)) else 0
    spilled = sum(units[one.place].nbytes for one in streamed) if rule.spill else 0
    nbytes = sum(unit.nbytes for unit in units)
    plan = ComponentPlan(rule, casting, nbytes, kept.total, len(units), len(staying))
    return Option(component, plan, units, streams, kept, working, leaf, resting + staging, spilled)


def _copied_each_time(component: Component, unit: UnitSize, rates: Rates) -> int:
    """Bytes that are copied whenever a unit comes; what is in no checkpoint lies in a temporary file as it works."""
    if not rates.on_cpu:
        return unit.nbytes
    return unit.copied if component.in_file else 0


def _copied_to_stay(component: Component, unit: UnitSize, rates: Rates) -> int:
    """Bytes of a unit that stays which are in memory and not mapped."""
    return unit.copied if rates.on_cpu and component.in_file else unit.nbytes


def _size(unit: UnitSize, copied: int) -> Sizes:
    return Sizes(copied, unit.nbytes - copied)


def _resident_size(unit: UnitSize, copied: int) -> Sizes:
    """Of a unit that is simply there: pages of a file come when they are read."""
    return Sizes(copied) if unit.by_rows or not unit.called else _size(unit, copied)


def _leaf(units: Sequence[UnitSize], casting: str | None) -> int:
    return 0 if casting is None else max((unit.leaf for unit in units), default=0)
