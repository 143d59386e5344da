"""The planner: finds the fastest plan that fits, the least memory a run takes, and what more memory would buy.

Pure arithmetic over what a run takes (`Workload`) and how fast a machine is (`Rates`): nothing is loaded or moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lowtide.casting.casting import PACKED
from lowtide.machine.heap import without_collecting
from lowtide.memory.bounds import Sizes, summed
from lowtide.memory.rule import Level
from lowtide.planning import explain
from lowtide.planning.frontier import (
    Choice,
    Limits,
    Point,
    base,
    best_trades,
    choices,
    options_by_component,
    slack,
    tick_of,
)
from lowtide.planning.options import Option
from lowtide.planning.pace import Pace
from lowtide.planning.plan import LOSSY, BudgetError, Budgets, Plan, StagePlan, check_allowed
from lowtide.planning.rates import Rates
from lowtide.planning.workload import EXACT, WHOLE, Stage, Workload

GIGABYTE = 10**9
SCHEMES: dict[str, tuple[Level | None, int]] = {
    "resident": (None, 0),
    "model offload": (Level.WHOLE, 0),
    "blocks": (Level.BLOCK, 1),
    "leaves": (Level.LEAF, 1),
    "sequential": (Level.LEAF, 0),
}
"""The usual plans by name: the level of all components, and how many units are loaded ahead."""


def choose(workload: Workload, rates: Rates, budgets: Budgets | None = None, allow: Iterable[str] = ()) -> Plan:
    """The fastest plan within `budgets`; of equally fast plans a lossless one, then the simplest.

    `allow` holds names of `LOSSY`. A larger budget never gives a slower plan. Raises `BudgetError` where nothing fits.
    """
    return Planner(workload, rates, tuple(allow)).choose(budgets or Budgets())


def minimum(workload: Workload, rates: Rates, allow: Iterable[str] = (), budgets: Budgets | None = None) -> Budgets:
    """The least of the device's memory that any plan takes, with the other budgets as given.

    On a GPU where no plan fits the given `ram`, the result has the least `ram` that fits instead.
    """
    return Planner(workload, rates, tuple(allow)).minimum(budgets or Budgets())


def curve(
    workload: Workload, rates: Rates, allow: Iterable[str] = (), budgets: Budgets | None = None
) -> list[tuple[int, Plan]]:
    """The best plans from the least memory to the fastest run, each with the bytes that the device must have for it."""
    return Planner(workload, rates, tuple(allow)).curve(budgets or Budgets())


def alternatives(
    workload: Workload, rates: Rates, budgets: Budgets | None = None, allow: Iterable[str] = ()
) -> dict[str, Plan]:
    """Plans by name: the usual ones, which may not fit, the smallest, and last the chosen one, if one fits."""
    return Planner(workload, rates, tuple(allow)).alternatives(budgets or Budgets())


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one workload on one machine, with the lossy forms and ways that `allow` names."""

    workload: Workload
    rates: Rates
    allow: tuple[str, ...] = ()
    _trades_within: dict[Limits, list[Point]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_allowed(self.allow)
        object.__setattr__(self, "rates", self.rates.in_workload(self.workload))

    def choose(self, budgets: Budgets) -> Plan:
        """See `choose`."""
        plan = self.within(budgets)
        if plan is None:
            raise self._refusal(budgets)
        return plan

    def within(self, budgets: Budgets) -> Plan | None:
        """The plan that `choose` gives, or None, where it raises an error that takes long to find words for."""
        best = self._best(budgets)
        return None if best is None else self._at(best, budgets)

    def minimum(self, budgets: Budgets) -> Budgets:
        """See `minimum`."""
        trades = self._trades(budgets)
        if not trades:
            budgets = replace(budgets, ram=self._least_host(budgets))
            trades = self._trades(budgets)
        return self._with_limit(budgets, trades[0].nbytes)

    def curve(self, budgets: Budgets) -> list[tuple[int, Plan]]:
        """See `curve`."""
        return [
            (point.nbytes, self._at(point, self._with_limit(budgets, point.nbytes))) for point in self._trades(budgets)
        ]

    def with_more(self, budgets: Budgets, name: str | None = None) -> Plan | None:
        """The plan with a gigabyte more of the budget called `name`, if one fits; no name means the device's memory."""
        name = name or self._device_budget
        limit = getattr(budgets, name)
        return self.within(budgets if limit is None else replace(budgets, **{name: limit + GIGABYTE}))

    def alternatives(self, budgets: Budgets) -> dict[str, Plan]:
        """See `alternatives`."""
        groups = self._groups(Limits())
        plans: dict[str, Plan] = {}
        by_rows = any(EXACT in stage.ways for stage in self.workload.stages)
        for name, scheme in SCHEMES.items():
            plans[name] = self._plan([_of_scheme(group, scheme, WHOLE) for group in groups], budgets)
            if by_rows:
                rows = [_of_scheme(group, scheme, EXACT) for group in groups]
                plans[f"{name}, decode by rows"] = self._plan(rows, budgets)
        for point in self._trades(budgets)[:1]:
            plans["smallest"] = self._at(point, budgets)
        best = self.within(budgets)
        if best is not None:
            plans["chosen"] = best
        return plans

    # ---- limits

    @property
    def _device_budget(self) -> str:
        return "ram" if self.rates.one_memory else "vram"

    def _best(self, budgets: Budgets) -> Point | None:
        """The fastest trade within the budgets; None where none fits."""
        limit = getattr(budgets, self._device_budget)
        fitting = [point for point in self._trades(budgets) if limit is None or point.nbytes <= limit]
        return fitting[-1] if fitting else None

    def _with_limit(self, budgets: Budgets, nbytes: int) -> Budgets:
        return replace(budgets, **{self._device_budget: nbytes})

    def _limits(self, budgets: Budgets) -> Limits:
        beside = not self.rates.one_memory
        return Limits(budgets.ram - self.rates.base if beside and budgets.ram is not None else None, budgets.disk)

    def _groups(self, limits: Limits) -> list[list[Choice]]:
        per_component = options_by_component(self.workload, self.rates, self.allow, limits)
        tick = tick_of(self.workload, self.rates)
        return [choices(options, self.workload, self.rates, self.allow, limits, tick) for options in per_component]

    def _least_host(self, budgets: Budgets) -> int:
        groups = self._groups(self._limits(budgets))
        return self.rates.base + sum(min(choice.beside for choice in group) for group in groups)

    def _trades(self, budgets: Budgets) -> list[Point]:
        limits = self._limits(budgets)
        if limits not in self._trades_within:
            with without_collecting():
                self._trades_within[limits] = best_trades(self.workload, self.rates, self.allow, limits)
        return self._trades_within[limits]

    def _refusal(self, budgets: Budgets) -> BudgetError:
        least = self.minimum(budgets)
        smallest = self.choose(least)
        helping = {
            name: Planner(self.workload, self.rates, (*self.allow, name)).minimum(budgets)
            for name in LOSSY
            if name not in self.allow
        }
        on_cpu = self.rates.one_memory
        advice = explain.advice(budgets, least, helping, on_cpu=on_cpu)
        return BudgetError(explain.refusal(smallest, budgets, least, on_cpu=on_cpu), advice, least)

    # ---- plans

    def _at(self, point: Point, budgets: Budgets) -> Plan:
        rates = self.rates.frugal if point.frugal else None
        return self._plan(point.choices, budgets, rates)

    def _plan(self, chosen: Sequence[Choice], budgets: Budgets, frugal: Rates | None = None) -> Plan:
        options = {choice.option.component.name: choice.option for choice in chosen}
        ways = {stage.name: (stage, way, pace) for choice in chosen for stage, way, pace in choice.ways}
        rates = frugal or self.rates
        pinned_most = 0 if rates.on_cpu else rates.pinned_most
        stages = tuple(self._stage(*ways[stage.name], options, rates) for stage in self.workload.stages)
        plan = Plan(
            self.rates.device,
            self.workload.dtype,
            {name: options[name].plan for name in self.workload.components},
            stages,
            budgets,
            self.allow,
            made_for=self.workload.made_for,
            unified=rates.unified,
            assumed=rates.assumed,
            pinned=min(pinned_most, sum(option.host for option in options.values())),
            pinned_most=pinned_most,
        )
        why = explain.reasons(plan, self.workload)
        return replace(plan, why=(*why, *explain.packing(plan, self._saved_by_packing(plan, rates))))

    def _saved_by_packing(self, plan: Plan, rates: Rates) -> float:
        """Seconds that a run would be faster if weights that are resident were packed, which is not allowed."""
        if PACKED in self.allow or not rates.on_cpu or (packed := rates.with_packed()) is rates:
            return 0.0
        saved = 0.0
        for name, component in self.workload.components.items():
            if plan.components[name].rule is None and plan.components[name].casting is None:
                stages = ((stage, stage.ways[plan.way(stage.name)].work) for stage in self.workload.stages)
                gains = (
                    stage.calls * (rates.in_stage(stage).seconds(work) - packed.in_stage(stage).seconds(work))
                    for stage, work in stages
                    if stage.component == name
                )
                saved += max(0.0, sum(gains) - component.nbytes / rates.packing)
        return saved

    def _stage(self, stage: Stage, way: str, pace: Pace, options: dict[str, Option], rates: Rates) -> StagePlan:
        call = stage.ways[way]
        others = summed(option.kept for name, option in options.items() if name != stage.component)
        weights: Sizes = others + options[stage.component].working
        resting = rates.base + sum(option.host for option in options.values())
        planned = StagePlan(
            stage.name,
            stage.component,
            stage.calls,
            way,
            weights=weights.used,
            mapped=weights.window,
            activations=call.peak - call.workspace,
            workspace=call.workspace,
            carried=stage.carried,
            base=base(rates),
            slack=slack(stage, call, rates) + weights.rounding,
            host=0 if rates.one_memory else resting,
            disk=call.stored + sum(option.spilled for option in options.values()),
            seconds=pace.seconds,
            compute_seconds=pace.compute,
            link_seconds=pace.link,
            disk_seconds=pace.disk,
            frugal=rates.gives_back(stage),
            libraries=0 if rates.one_memory else rates.libraries,
        )
        return replace(planned, host=planned.peak) if rates.one_memory else planned


def _of_scheme(group: list[Choice], scheme: tuple[Level | None, int], way: str) -> Choice:
    """The choice with this level and prefetch and no resident blocks or casting; stages that can go `way` go it."""

    def matches(choice: Choice) -> bool:
        rule = choice.option.plan.rule
        level = (None, 0) if rule is None else (rule.level, rule.prefetch)
        is_plain = rule is None or (not rule.resident_bytes and rule.prefetch_bytes is None)
        return level == scheme and choice.option.plan.casting is None and is_plain

    def rank(choice: Choice) -> tuple[int, int]:
        return sum(chosen != (way if way in stage.ways else WHOLE) for stage, chosen, _ in choice.ways), choice.cost

    return min(filter(matches, group), key=rank)
