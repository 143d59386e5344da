"""The best trades of memory for time over all plans of a workload.

While a stage's component c works, the device holds what all others keep, Σ R − R_c, what c takes in its calls, W_c, and
the activations A: at most (Σ R) + max over the components of (W − R + A), the `over` of each. So for each limit E on
`over`, the choices within it are merged component by component, and of sums of R only those are kept that are not both
larger and slower than another: exact, and with E + Σ R as the device's bytes all plans that matter are found. A second
sum is kept beside R: bytes in a GPU's host memory, or, on a CPU, weights spilled to disk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

from lowtide.planning.options import Option, options
from lowtide.planning.pace import Pace, Timing, exceeds_cache, shares_of
from lowtide.planning.plan import LOSSY
from lowtide.planning.rates import Rates
from lowtide.planning.workload import BLENDED, WAYS, Call, Stage, Workload

BLENDED_TILING = "blended_tiling"
PRECISION = 1e-3
"""Of the seconds that computing takes: plans count as equally fast where each component's differ by less."""
_TICK = 1 << 24
"""A cost is ticks of time, and below them, for plans that are equally fast, how many choices lose and how simple."""
_LOSS = 1 << 16
_ORDER = itemgetter(0, 1, 2)


@dataclass(frozen=True)
class Choice:
    """One component's option and the way of each of its stages; `over` bytes are in use while it works, beyond what is
    kept of all components. `beside` is the second sum, `stored` bytes of rows lie in a file.
    """

    option: Option
    ways: tuple[tuple[Stage, str, Pace], ...]
    over: int
    beside: int
    stored: int
    cost: int


class Point(NamedTuple):
    """A plan: bytes on the device (while merging: those kept), the second sum, its cost, and its choices as a chain."""

    nbytes: int
    beside: int
    cost: int
    chain: Any = None
    frugal: bool = False

    @property
    def choices(self) -> list[Choice]:
        """A choice a component."""
        found, chain = [], self.chain
        while chain is not None:
            chain, choice = chain
            found.append(choice)
        return found


@dataclass(frozen=True)
class Limits:
    """What else is limited: a GPU's host memory, None where it is not; temporary files."""

    host: int | None = None
    disk: int | None = None


def best_trades(
    workload: Workload, rates: Rates, allow: Iterable[str] = (), limits: Limits | None = None
) -> list[Point]:
    """The plans that none beats in both bytes on the device and time, from the smallest to the fastest."""
    known, tick = limits or Limits(), tick_of(workload, rates)
    held = held_by(workload, rates, allow, known)
    found: list[Point] = []
    for one in (rates, rates.frugal):
        if one is not None:
            found += _all_trades([choices(each, workload, one, allow, known, tick) for each in held], one, known)
    return staircase(found)


def _all_trades(groups: list[list[Choice]], rates: Rates, limits: Limits) -> Iterator[Point]:
    for stored, beside in _further_limits(groups, rates, limits):
        fitting = [[one for one in group if one.stored <= stored] for group in groups]
        for point in _trades(fitting, beside):
            yield Point(point.nbytes, 0, point.cost, point.chain, rates.is_frugal)


def _further_limits(groups: list[list[Choice]], rates: Rates, limits: Limits) -> Iterator[tuple[int, int | None]]:
    """Limits of rows stored on disk, each with that of the second sum which it leaves."""
    stored = sorted({one.stored for group in groups for one in group})
    if not rates.on_cpu or limits.disk is None:
        yield max(stored, default=0) if limits.disk is None else limits.disk, limits.host
        return
    for size in stored:
        if size <= limits.disk:
            yield size, limits.disk - size


def _trades(groups: list[list[Choice]], limit: int | None) -> Iterator[Point]:
    ordered = sorted(groups, key=len)  # the last merge has no second sum to look at any more, so it may be large
    most = [max((one.beside for one in group), default=0) for group in ordered]
    for over in sorted({one.over for group in groups for one in group}):
        sums = [Point(0, 0, 0)]
        for place, group in enumerate(ordered):
            within = (Point(one.option.kept.total, one.beside, one.cost, one) for one in group if one.over <= over)
            sums = _merged(sums, staircase(within), limit, sum(most[place + 1 :]))
        yield from (Point(one.nbytes + over, one.beside, one.cost, one.chain) for one in sums)


def _merged(sums: list[Point], group: list[Point], limit: int | None, to_come: int) -> list[Point]:
    """Sums with one more choice each; a second sum that no longer matters, whatever is to come, counts as any other."""
    enough = 0 if limit is None else limit - to_come
    return staircase(
        Point(a.nbytes + b.nbytes, max(enough, a.beside + b.beside), a.cost + b.cost, (a.chain, b.chain))
        for a in sums
        for b in group
        if limit is None or a.beside + b.beside <= limit
    )


def staircase(points: Iterable[Point]) -> list[Point]:
    """Those that no other one equals or beats in everything, by bytes."""
    kept: list[Point] = []
    besides: list[int] = []
    costs: list[int] = []
    for point in sorted(points, key=_ORDER):
        place = bisect_right(besides, point.beside)
        if place and costs[place - 1] <= point.cost:
            continue
        start, end = bisect_left(besides, point.beside), place
        while end < len(costs) and costs[end] >= point.cost:
            end += 1
        besides[start:end], costs[start:end] = [point.beside], [point.cost]
        kept.append(point)
    return kept


def held_by(workload: Workload, rates: Rates, allow: Iterable[str], limits: Limits) -> list[list[Option]]:
    """For each component its options."""
    castings, scarce = [name for name in LOSSY if name in set(allow)], limits.host is not None
    return [options(component, rates, castings, scarce_host=scarce) for component in workload.components.values()]


def choices(
    held: list[Option], workload: Workload, rates: Rates, allow: Iterable[str], limits: Limits, tick: float
) -> list[Choice]:
    """Every option of a component with every way through its stages."""
    allowed = set(allow)
    stages = [stage for stage in workload.stages if stage.component == held[0].component.name]
    ways_of = [(stage, _ways(stage, rates, allowed)) for stage in stages]
    cold = exceeds_cache(workload, rates)
    shares: dict[int, list[float]] = {}
    found: list[Choice] = []
    for option in held:
        if id(option.units) not in shares:  # options of one level have the same units
            shares[id(option.units)] = shares_of(option.units, rates)
        timing = Timing(option, rates, shares[id(option.units)], cold=cold)
        per_stage = [[(one, way, timing.stage(one.calls, took)) for way, took in ways] for one, ways in ways_of]
        found += [_choice(option, ways, rates, limits, tick) for ways in product(*per_stage)]
    return found


def _ways(stage: Stage, rates: Rates, allowed: Collection[str]) -> list[tuple[str, float]]:
    """The ways that a stage may go, and what a call computes in each, in seconds."""
    there = rates.in_stage(stage)
    allowed_ways = {name: call for name, call in stage.ways.items() if name != BLENDED or BLENDED_TILING in allowed}
    return [(name, there.seconds(call.work)) for name, call in allowed_ways.items()]


def tick_of(workload: Workload, rates: Rates) -> float:
    """The seconds that count as none."""
    fastest = (one.calls * min(took for _, took in _ways(one, rates, LOSSY)) for one in workload.stages)
    return max(PRECISION * sum(fastest), 1e-9)


def _choice(
    option: Option, ways: tuple[tuple[Stage, str, Pace], ...], rates: Rates, limits: Limits, tick: float
) -> Choice:
    calls = [(stage, stage.ways[way]) for stage, way, _ in ways]
    over = max((beside_weights(stage, call, rates) + stage.withheld for stage, call in calls), default=base(rates))
    ticks = round(sum(pace.seconds for *_, pace in ways) / tick)
    losses = (option.plan.casting is not None) + sum(way == BLENDED for _, way, _ in ways)
    simple = option.complexity + sum(WAYS.index(way) for _, way, _ in ways)
    return Choice(
        option,
        ways,
        over + option.working.total - option.kept.total,
        option.spilled if rates.on_cpu else option.host if limits.host is not None else 0,
        max((call.stored for _, call in calls), default=0),
        ticks * _TICK + losses * _LOSS + simple,
    )


def base(rates: Rates) -> int:
    """Bytes on the device before anything is loaded."""
    return rates.base if rates.on_cpu else rates.device_base


def slack(stage: Stage, call: Call, rates: Rates) -> int:
    """What the allocator takes on top of activations."""
    there = rates.in_stage(stage)
    return int(min(there.slack_most, there.slack * (call.peak - call.paged + stage.carried)))


def beside_weights(stage: Stage, call: Call, rates: Rates) -> int:
    """Bytes on the device during a stage that are no weights."""
    return base(rates) + call.peak + stage.carried + slack(stage, call, rates)
