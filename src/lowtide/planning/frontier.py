"""The best trades of memory for time over all plans of a workload.

R is what a component keeps on the device between calls, W what it takes during its calls, and A the activations of its
stages. While component c works, the device holds Σ R − R_c + W_c + A_c. The peak is therefore Σ R plus the largest
`over` of any component, where over = W − R + A. For each limit E on `over`, the choices within the limit are merged
component by component; a sum of R that is both larger and slower than another sum is dropped. This is exact: with
E + Σ R as the device's bytes, all plans that matter are found. E rises, and each sum is made once: at the first E that
lets it. A second sum is kept beside R: on a GPU bytes in host memory, on a CPU bytes of weights spilled to disk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

from lowtide.casting.casting import INT4, INT8_DYNAMIC, PACKED
from lowtide.planning.options import Option, component_options, less_on_host
from lowtide.planning.pace import Pace, Timing, exceeds_cache, shares_of
from lowtide.planning.plan import ALLOWED, LOSSY
from lowtide.planning.rates import Rates
from lowtide.planning.workload import BLENDED, WAYS, Call, Stage, Workload

BLENDED_TILING = "blended_tiling"
PRECISION = 1e-3
"""Share of a run's computing time. Plans count as equally fast if no component's time differs by more."""
_TICK = 1 << 24
"""A cost is one number, since sums of costs are compared very often: ticks of time from bit 24 on; for plans that are
equally fast, the count of choices that lose exactness (int4 twice) from bit 16 on; and below that how complex the plan
is."""
_LOSS = 1 << 16
_ORDER = itemgetter(0, 1, 2)


@dataclass(frozen=True)
class Choice:
    """An option of one component, with a way for each of its stages.

    `over` bytes are in use while the component works, beyond what all components keep. `beside` is its part of the
    second sum. `stored` bytes of rows lie in a file. Among choices that take no more, the one of least `cost` is best.
    """

    option: Option
    ways: tuple[tuple[Stage, str, Pace], ...]
    over: int
    beside: int
    stored: int
    cost: int


class Point(NamedTuple):
    """A plan: bytes on the device (while merging: bytes kept), the second sum, the cost, choices as nested pairs."""

    nbytes: int
    beside: int
    cost: int
    chain: Any = None
    frugal: bool = False

    @property
    def choices(self) -> list[Choice]:
        """The choices, one for each component."""
        choices, chain = [], self.chain
        while chain is not None:
            chain, choice = chain
            choices.append(choice)
        return choices


@dataclass(frozen=True)
class Limits:
    """Bytes beside the device's memory: a GPU's `host` memory, temporary files on `disk`; None for no limit."""

    host: int | None = None
    disk: int | None = None


def best_trades(
    workload: Workload, rates: Rates, allow: Iterable[str] = (), limits: Limits | None = None
) -> list[Point]:
    """The plans that no other plan beats in both bytes on the device and time, from the smallest to the fastest."""
    limits, tick = limits or Limits(), tick_of(workload, rates)
    per_component = options_by_component(workload, rates, allow, replace(limits, host=None))
    points: list[Point] = []
    for heap_rates in filter(None, (rates, rates.frugal)):

        def unbeaten(options: list[Option], rates: Rates = heap_rates) -> list[Choice]:
            return _unbeaten(choices(options, workload, rates, allow, limits, tick))

        groups = [unbeaten(options) for options in per_component]
        if limits.host is not None:
            groups = [_unbeaten([*group, *unbeaten(_scarcer(group, rates))]) for group in groups]
        points += _all_trades(groups, heap_rates, limits)
    return staircase(points)


def _scarcer(group: list[Choice], rates: Rates) -> list[Option]:
    """Options with less on the host: only of those that are worth it where all of it is there, since they take time."""
    options = {id(choice.option): choice.option for choice in group}
    return [less for option in options.values() for less in less_on_host(option, rates)]


def _all_trades(groups: list[list[Choice]], rates: Rates, limits: Limits) -> Iterator[Point]:
    for stored, beside in _further_limits(groups, rates, limits):
        fitting = [[choice for choice in group if choice.stored <= stored] for group in groups]
        for point in _trades(fitting, beside):
            yield Point(point.nbytes, 0, point.cost, point.chain, rates.is_frugal)


def _further_limits(groups: list[list[Choice]], rates: Rates, limits: Limits) -> Iterator[tuple[int, int | None]]:
    """Pairs of limits: the bytes of rows on disk, and what they leave for the second sum."""
    stored = sorted({choice.stored for group in groups for choice in group})
    if not rates.one_memory or limits.disk is None:
        yield max(stored, default=0) if limits.disk is None else limits.disk, limits.host
        return
    for size in stored:
        if size <= limits.disk:
            yield size, limits.disk - size


def _trades(groups: list[list[Choice]], limit: int | None) -> Iterator[Point]:
    # what takes the most of the second sum first: it hardly matters then what is to come
    ordered = sorted(groups, key=_most_beside, reverse=True)
    to_come = [sum(map(_most_beside, ordered[place + 1 :])) for place in range(len(ordered))]
    owns: list[list[Point]] = [[] for _ in ordered]
    sums: list[list[Point]] = [[] for _ in ordered]
    for over in sorted({choice.over for group in groups for choice in group}):
        before, fresh = [Point(0, 0, 0)], list[Point]()
        for place, group in enumerate(ordered):
            more = [
                Point(choice.option.kept.total, choice.beside, choice.cost, choice)
                for choice in group
                if choice.over == over
            ]
            owns[place], _, own_fresh = _with_more(owns[place], more)
            candidates = [
                *_merged(before, own_fresh, limit, to_come[place]),
                *_merged(fresh, owns[place], limit, to_come[place]),
            ]
            sums[place], before, fresh = _with_more(sums[place], candidates)
        yield from (Point(point.nbytes + over, point.beside, point.cost, point.chain) for point in fresh)


def _most_beside(group: list[Choice]) -> int:
    return max((choice.beside for choice in group), default=0)


def _with_more(points: list[Point], more: list[Point]) -> tuple[list[Point], list[Point], list[Point]]:
    """The best of both: all of them, those of `points` and those of `more`."""
    if not more:
        return points, points, []
    known = set(map(id, points))
    best = staircase([*points, *more])
    return best, [point for point in best if id(point) in known], [point for point in best if id(point) not in known]


def _merged(sums: list[Point], group: list[Point], limit: int | None, to_come: int) -> Iterator[Point]:
    """Sums with one more choice each. Second sums that stay within the limit whatever is `to_come` count as equal."""
    enough = 0 if limit is None else limit - to_come
    for a in sums:
        for b in group:
            beside = a.beside + b.beside
            if limit is None or beside <= limit:
                yield Point(a.nbytes + b.nbytes, max(enough, beside), a.cost + b.cost, (a.chain, b.chain))


def staircase(points: Iterable[Point]) -> list[Point]:
    """The points that no other point equals or beats in bytes, second sum and cost; sorted by bytes."""
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


def options_by_component(workload: Workload, rates: Rates, allow: Iterable[str], limits: Limits) -> list[list[Option]]:
    """The options of each component."""
    castings, scarce = [name for name in ALLOWED if name in set(allow)], limits.host is not None
    dynamic = _multiplied_in_int8(workload, rates)
    return [
        component_options(
            component,
            rates,
            [INT8_DYNAMIC if name == "int8" and component.name in dynamic else name for name in castings],
            scarce_host=scarce,
        )
        for component in workload.components.values()
    ]


def _multiplied_in_int8(workload: Workload, rates: Rates) -> set[str]:
    """The components that multiply in int8 if they are in int8: those that are called in steps.

    Text encoders have features that are much larger than the others, and a decoder's maps are rounded by what is in
    them, so that rows of them would be rounded in other ways.
    """
    if not rates.on_cpu or rates.with_int8() is rates:
        return set()
    return {stage.component for stage in workload.stages if stage.keeps_heap}


def choices(
    options: list[Option], workload: Workload, rates: Rates, allow: Iterable[str], limits: Limits, tick: float
) -> list[Choice]:
    """Every option of a component with every way through its stages."""
    allowed = set(allow)
    names = {option.component.name for option in options}
    stages = [stage for stage in workload.stages if stage.component in names]
    ways_of = [(stage, _ways(stage, rates, allowed)) for stage in stages]
    cold = exceeds_cache(workload, rates)
    shares: dict[int, tuple[list[float], dict[Any, Any]]] = {}
    forms = {option.plan.casting for option in options}
    of_form = {PACKED: rates.with_packed, INT8_DYNAMIC: rates.with_int8}
    rates_in = {form: faster() for form, faster in of_form.items() if form in forms}
    ways_in = {form: [(stage, _ways(stage, of, allowed)) for stage in stages] for form, of in rates_in.items()}
    all_choices: list[Choice] = []
    for option in options:
        if id(option.units) not in shares:  # options of one level have the same units
            shares[id(option.units)] = shares_of(option.units, rates), {}
        timing = Timing(option, rates, *shares[id(option.units)], cold=cold)
        per_stage = [
            [(stage, way, timing.stage(stage.calls, seconds, stage.visits)) for way, seconds in ways]
            for stage, ways in ways_in.get(option.plan.casting or "", ways_of)
        ]
        all_choices += [_choice(option, ways, rates, limits, tick) for ways in product(*per_stage)]
    return all_choices


def _unbeaten(all_choices: list[Choice]) -> list[Choice]:
    """Those that no other equals or beats in all that counts: merging takes a time that grows with their square."""
    kept: list[tuple[int, int, int, int, int]] = []
    unbeaten: list[Choice] = []
    for counts, choice in sorted(((_counts(choice), choice) for choice in all_choices), key=itemgetter(0)):
        _, over, beside, stored, cost = counts  # those before it have fewer bytes kept
        if not any(o <= over and b <= beside and s <= stored and c <= cost for _, o, b, s, c in kept):
            kept.append(counts)
            unbeaten.append(choice)
    return unbeaten


def _counts(choice: Choice) -> tuple[int, int, int, int, int]:
    return choice.option.kept.total, choice.over, choice.beside, choice.stored, choice.cost


def _ways(stage: Stage, rates: Rates, allowed: Collection[str]) -> list[tuple[str, float]]:
    """The ways that a stage may go, each with the seconds that one call computes."""
    stage_rates = rates.in_stage(stage)
    allowed_ways = {name: call for name, call in stage.ways.items() if name != BLENDED or BLENDED_TILING in allowed}
    return [(name, stage_rates.seconds(call.work)) for name, call in allowed_ways.items()]


def tick_of(workload: Workload, rates: Rates) -> float:
    """Seconds to which times are rounded: smaller differences do not count."""
    fastest = (stage.calls * min(seconds for _, seconds in _ways(stage, rates, LOSSY)) for stage in workload.stages)
    return max(PRECISION * sum(fastest), 1e-9)


def _choice(
    option: Option, ways: tuple[tuple[Stage, str, Pace], ...], rates: Rates, limits: Limits, tick: float
) -> Choice:
    calls = [(stage, stage.ways[way]) for stage, way, _ in ways]
    over = max((beside_weights(stage, call, rates) + stage.withheld for stage, call in calls), default=base(rates))
    ticks = round(sum(pace.seconds for *_, pace in ways) / tick)
    casting = option.plan.casting
    losses = (casting not in (None, PACKED)) + (casting == INT4) + sum(way == BLENDED for _, way, _ in ways)
    simple = option.complexity + sum(WAYS.index(way) for _, way, _ in ways)
    return Choice(
        option,
        ways,
        over + option.working.total - option.kept.total,
        option.spilled if rates.one_memory else option.host if limits.host is not None else 0,
        max((call.stored for _, call in calls), default=0),
        ticks * _TICK + losses * _LOSS + simple,
    )


def base(rates: Rates) -> int:
    """Bytes on the device before anything is loaded."""
    return (rates.base if rates.one_memory else 0) + rates.device_base


def slack(stage: Stage, call: Call, rates: Rates) -> int:
    """Bytes that the allocator takes on top of activations; where it goes by known rules, at least by these."""
    stage_rates = rates.in_stage(stage)
    share = stage_rates.slack * (call.peak - call.paged + stage.carried)
    return int(min(stage_rates.slack_most, max(call.spare, share)))


def beside_weights(stage: Stage, call: Call, rates: Rates) -> int:
    """Bytes on the device during a stage besides weights."""
    return base(rates) + call.peak + stage.carried + slack(stage, call, rates)
