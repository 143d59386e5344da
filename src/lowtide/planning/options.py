"""The options for holding one component's weights, each with the bytes that it takes between calls and during them.

Weights can be resident; come as a whole for a stage (model offload); come block by block, with some blocks resident, in
every number that `spread` can choose; or come leaf by leaf. Blocks and leaves come with one unit loaded ahead, or with
none. Beside an accelerator with memory of its own, blocks also come with as many ahead as find room in so many bytes,
and with those resident that keep copies and computing in step. On a CPU weights rest in their files. On a GPU they rest
in host memory or, where that is limited, partly or wholly in files. Weights in 8 or 4 bits are in no file, so on a CPU
they stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowtide.casting.casting import PACKED
from lowtide.machine.segments import rounding
from lowtide.memory.bounds import (
    ROWS_READ,
    STAGE_BYTES,
    Sizes,
    bound,
    bound_by_bytes,
    depth,
    least_room,
    spread,
    summed,
    within,
)
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.plan import ComponentPlan
from lowtide.planning.rates import Rates
from lowtide.planning.residents import in_step
from lowtide.planning.workload import Component, UnitSize

LESS_ON_HOST = (0.5, 0.0)
"""Shares of a component's streamed weights that rest in a GPU's host memory where it is scarce; elsewhere all do."""
LARGEST = (2, 3)
"""Of a component's largest unit that streams: how many have room where bytes limit what is loaded ahead."""
BUDGETS = 12
"""For how many shares of a component's bytes units are chosen that keep copies and computing in step."""
STEPS = 2
"""How many values of `resident_bytes` are tried for each unit."""


class Streamed(NamedTuple):
    """A unit that streams: its `place` among the units, how many of its bytes are `copied` rather than mapped, whether
    it comes from a file (`on_disk`), and whether a GPU gets it through buffers (`staged`), being in no pinned memory.
    """

    place: int
    copied: int
    on_disk: bool
    staged: bool = False


@dataclass(frozen=True)
class Option:
    """An option for holding a component's weights.

    `kept` bytes stay on the device between calls; `working` bytes are there during calls, at most, of which `leaf` are
    one layer's dequantized weights. `host` bytes rest in a GPU's host memory, `spilled` bytes in a temporary file.
    `streams` are the units that come and go.
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
        """How far the option is from resident, which is 0: of equally fast options the simplest is best."""
        rule = self.plan.rule
        if rule is None:
            return 0
        return (
            1
            + 2 * list(Level).index(rule.level)
            + (rule.prefetch == 0)
            + (rule.prefetch_bytes is not None)
            + any(stream.on_disk for stream in self.streams)
        )


def component_options(
    component: Component, rates: Rates, castings: Sequence[str], *, scarce_host: bool
) -> list[Option]:
    """All options for a component; `scarce_host` adds options that take less of a GPU's host memory."""
    if not component.movable:
        return [_resident(component, rates, None)]
    options: list[Option] = []
    for casting in (None, *[name for name in castings if name in component.castings and _can_be(name, rates)]):
        options.append(_resident(component, rates, casting))
        if not (rates.one_memory and casting):
            options += _offloaded(component, rates, casting)
    return [*options, *(less for option in options for less in less_on_host(option, rates) if scarce_host)]


def _can_be(casting: str, rates: Rates) -> bool:
    """Whether weights can be in a form here: packed ones are for CPUs on which that is faster."""
    return casting != PACKED or (rates.on_cpu and rates.with_packed() is not rates)


def less_on_host(option: Option, rates: Rates) -> Iterator[Option]:
    """The same with less of what streams in host memory, if it can be read from files instead."""
    rule = option.plan.rule
    if rule is None or rule.rest is not Tier.HOST or option.plan.casting is not None or not option.component.in_file:
        return
    staying = _staying(option.units, rule)
    streamed = sum(unit.nbytes for place, unit in enumerate(option.units) if place not in staying)
    for share in LESS_ON_HOST:
        rest = replace(rule, host_bytes=int(streamed * share)) if share else replace(rule, rest=Tier.DISK)
        yield under_rule(option.component, rates, rest, None)


def units_of(component: Component, level: Level, casting: str | None) -> tuple[UnitSize, ...]:
    """The units of a component at a level, with weights in the form called `casting`, or in their own (None)."""
    return (component.units if casting is None else component.castings[casting])[level]


def _resident(component: Component, rates: Rates, casting: str | None) -> Option:
    units = units_of(component, Level.LEAF, casting)
    kept = summed(_resident_size(unit, rates, _copied_to_stay(component, unit, rates)) for unit in units)
    leaf = _leaf(component, units, casting)
    plan = ComponentPlan(None, casting, kept.used, kept.used, len(units), len(units))
    return Option(component, plan, units, (), kept, kept + Sizes(leaf), leaf)


def _offloaded(component: Component, rates: Rates, casting: str | None) -> Iterator[Option]:
    for level, prefetch in ((Level.WHOLE, 0), (Level.BLOCK, 1), (Level.BLOCK, 0), (Level.LEAF, 1), (Level.LEAF, 0)):
        units = units_of(component, level, casting)
        spread_out = [
            Rule(level, prefetch=prefetch, resident_bytes=resident) for resident in _resident_sizes(units, level)
        ]
        for rule in spread_out if prefetch or rates.one_memory else spread_out[::2]:
            on_disk = replace(rule, rest=Tier.DISK, spill=not component.in_file)
            yield under_rule(component, rates, on_disk if rates.one_memory else rule, casting)
        if level is Level.BLOCK and prefetch and not rates.one_memory:
            # some of the rules will do, since planning takes time; weights in 8 bits may have other names once they are
            for rule in [*spread_out[::4], *([] if casting else _in_step(spread_out[0], units, rates))]:
                for room in _rooms(units, rule):
                    yield under_rule(component, rates, replace(rule, prefetch_bytes=room), casting)


def _in_step(rule: Rule, units: Sequence[UnitSize], rates: Rates) -> Iterator[Rule]:
    """The rule with those units resident that keep copies and computing in step, if work is known."""
    sizes, seconds = [unit.nbytes * unit.called for unit in units], [rates.seconds(unit.work) for unit in units]
    if sum(seconds) > 0:
        budgets = (sum(sizes) * step // BUDGETS for step in range(1, BUDGETS))
        for staying in dict.fromkeys(tuple(in_step(sizes, seconds, budget)) for budget in budgets):
            if staying:
                nbytes, names = sum(sizes[place] for place in staying), tuple(units[place].name for place in staying)
                yield replace(rule, resident_bytes=nbytes, resident_units=names)


def _rooms(units: Sequence[UnitSize], rule: Rule) -> list[int]:
    """Values of `prefetch_bytes`: the least with which places begin anew as rarely as in so many of the largest."""
    staying = _staying(units, rule)
    sizes = [unit.nbytes for place, unit in enumerate(units) if place not in staying and not unit.aside]
    most = max(sizes, default=0)
    rooms = {least_room(sizes, most * count) for count in LARGEST if most * count < sum(sizes)}
    return sorted(rooms)


def _resident_sizes(units: Sequence[UnitSize], level: Level) -> list[int]:
    """Values of `resident_bytes` that each keep a different set of units; the first keeps none."""
    if level is not Level.BLOCK:
        return [0]
    total, count = sum(unit.nbytes for unit in units), STEPS * len(units)
    budgets: dict[tuple[int, ...], int] = {}
    for step in range(count):
        budget = -(-total * step // count)
        budgets.setdefault(tuple(_evenly(units, budget)), budget)
    return list(budgets.values())


def under_rule(component: Component, rates: Rates, rule: Rule, casting: str | None) -> Option:
    """The option that a rule makes of a component."""
    units = units_of(component, rule.level, casting)
    staying = _staying(units, rule)
    places = [place for place in range(len(units)) if place not in staying]
    on_host = set(_fitting(places, units, rule.host_bytes)) if rule.rest is Tier.HOST else set[int]()
    # as if it were the only component: the others may leave it less
    pinned = set(_fitting(sorted(on_host), units, rates.pinned_most))
    streamed = tuple(
        Streamed(
            place,
            _copied_each_time(component, units[place], rates),
            on_disk=place not in on_host,
            staged=not rates.on_cpu and place not in pinned,
        )
        for place in places
    )
    streams = tuple(stream for stream in streamed if units[stream.place].called)
    kept = summed(_size(units[place], _copied_to_stay(component, units[place], rates), rates) for place in staying)
    ring = [_size(units[stream.place], stream.copied, rates) for stream in streamed if not units[stream.place].aside]
    aside = [_size(units[stream.place], stream.copied, rates) for stream in streamed if units[stream.place].aside]
    several = any(units[stream.place].modules > 1 for stream in streamed if not units[stream.place].aside)
    leaf = _leaf(component, units, casting)
    if rule.prefetch_bytes is None:
        working = bound([kept], ring, aside, depth(rule.prefetch, several=several)) + Sizes(leaf)
    else:
        working = bound_by_bytes([kept], ring, aside, rule.prefetch_bytes, several=several) + Sizes(leaf)
    resting = sum(units[stream.place].nbytes for stream in streamed if not stream.on_disk)
    is_staged = not rates.on_cpu and (bool(staying) or any(stream.staged for stream in streamed))
    staging = 2 * STAGE_BYTES * is_staged
    working += Sizes(staging if rates.unified else 0)
    spilled = sum(units[stream.place].nbytes for stream in streamed) if rule.spill else 0
    nbytes = sum(unit.nbytes for unit in units)
    plan = ComponentPlan(rule, casting, nbytes, kept.used, len(units), len(staying))
    return Option(component, plan, units, streams, kept, working, leaf, resting + staging, spilled)


def _staying(units: Sequence[UnitSize], rule: Rule) -> set[int]:
    """Places of the units that a rule keeps on the device."""
    if rule.resident_units is None:
        return set(_evenly(units, rule.resident_bytes))
    names = set(rule.resident_units)
    return {place for place, unit in enumerate(units) if unit.name in names}


def _evenly(units: Sequence[UnitSize], budget: int) -> list[int]:
    """Places of units that `spread` chooses: it goes through them as the module has them, not as they are called."""
    order = sorted(range(len(units)), key=lambda place: units[place].registered)
    return [order[place] for place in spread([units[place].nbytes for place in order], budget)]


def _fitting(places: Sequence[int], units: Sequence[UnitSize], budget: int | None) -> list[int]:
    """Those of the places whose units find room in `budget` bytes, one after another as the module has them."""
    if budget is None or sum(units[place].nbytes for place in places) <= budget:
        return list(places)
    order = sorted(places, key=lambda place: units[place].registered)
    fits = within([units[place].nbytes for place in order], budget)
    return [place for place, has_room in zip(order, fits, strict=True) if has_room]


def _copied_each_time(component: Component, unit: UnitSize, rates: Rates) -> int:
    """Bytes copied whenever a unit comes; on a CPU weights of no checkpoint are mapped from a temporary file."""
    if not rates.on_cpu:
        return unit.nbytes
    return unit.copied if component.in_file else 0


def _copied_to_stay(component: Component, unit: UnitSize, rates: Rates) -> int:
    """Bytes of a resident unit that are in memory and not mapped from a file."""
    return unit.copied if rates.on_cpu and component.in_file else unit.nbytes


def _size(unit: UnitSize, copied: int, rates: Rates) -> Sizes:
    mapped = unit.nbytes - copied
    window = min(mapped, ROWS_READ) if unit.by_rows else mapped
    return Sizes(copied, window, rounding(copied, rates.device))


def _resident_size(unit: UnitSize, rates: Rates, copied: int) -> Sizes:
    """The size of a unit where all units are resident: pages of a file take memory only once they are read."""
    size = _size(unit, copied, rates)
    return replace(size, window=0) if unit.by_rows or not unit.called else size


def _leaf(component: Component, units: Sequence[UnitSize], casting: str | None) -> int:
    is_small = casting is not None or component.in_few_bits
    return max((unit.leaf for unit in units), default=0) if is_small else 0
