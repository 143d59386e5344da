"""The planner: the fastest plan that fits, the least memory a run takes, and what more memory would buy.

Pure arithmetic over what a run takes (`Workload`) and what a machine does (`Rates`): nothing is loaded or moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lowtide.machine.heap import without_collecting
from lowtide.memory.bounds import Sizes, summed
from lowtide.memory.rule import Level
from lowtide.planning import explain
from lowtide.planning.frontier import Choice, Limits, Point, base, best_trades, choices, held_by, slack, tick_of
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
"""The usual plans: all components at one level, with so much loaded ahead."""


def choose(workload: Workload, rates: Rates, budgets: Budgets | None = None, allow: Iterable[str] = ()) -> Plan:
    """The fastest plan within `budgets`; of equally fast ones a lossless one, then the simplest.

    `allow` holds names of `LOSSY`. More budget is never slower. Raises `BudgetError` where nothing fits.
    """
    return Planner(workload, rates, tuple(allow)).choose(budgets or Budgets())


def minimum(workload: Workload, rates: Rates, allow: Iterable[str] = (), budgets: Budgets | None = None) -> Budgets:
    """The least of the device's memory that a plan takes, the other budgets being as given.

    On a GPU whose `ram` is less than any plan takes, that is the least too.
    """
    return Planner(workload, rates, tuple(allow)).minimum(budgets or Budgets())


def curve(
    workload: Workload, rates: Rates, allow: Iterable[str] = (), budgets: Budgets | None = None
) -> list[tuple[int, Plan]]:
    """From the least memory to the fastest run: bytes of the device's memory, and the best plan from there on."""
    return Planner(workload, rates, tuple(allow)).curve(budgets or Budgets())


def alternatives(
    workload: Workload, rates: Rates, budgets: Budgets | None = None, allow: Iterable[str] = ()
) -> dict[str, Plan]:
    """The usual plans by name whether or not they fit, the smallest, and, where one fits, the chosen one last."""
    return Planner(workload, rates, tuple(allow)).alternatives(budgets or Budgets())


@dataclass(frozen=True)
class Planner:
    """What is to be run, on what machine, with what allowed: asked for plans."""

    workload: Workload
    rates: Rates
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_allowed(self.allow)
        object.__setattr__(self, "rates", self.rates.in_workload(self.workload))
        object.__setattr__(self, "_known", {})

    def choose(self, budgets: Budgets) -> Plan:
        """See `choose`."""
        best = self._best(budgets)
        if best is None:
            raise self._refusal(budgets)
        return self._at(best, budgets)

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

    def with_more(self, budgets: Budgets, name: str | None = None) -> Plan:
        """What the next gigabyte of the budget called so, or of the device's memory, would buy."""
        name = name or self._device_budget
        limit = getattr(budgets, name)
        return self.choose(budgets if limit is None else replace(budgets, **{name: limit + GIGABYTE}))

    def alternatives(self, budgets: Budgets) -> dict[str, Plan]:
        """See `alternatives`."""
        groups = self._groups(Limits())
        found: dict[str, Plan] = {}
        by_rows = any(EXACT in stage.ways for stage in self.workload.stages)
        for name, scheme in SCHEMES.items():
            found[name] = self._plan([_of_scheme(group, scheme, WHOLE) for group in groups], budgets)
            if by_rows:
                rows = [_of_scheme(group, scheme, EXACT) for group in groups]
                found[f"{name}, decode by rows"] = self._plan(rows, budgets)
        for point in self._trades(budgets)[:1]:
            found["smallest"] = self._at(point, budgets)
        best = self._best(budgets)
        if best is not None:
            found["chosen"] = self._at(best, budgets)
        return found

    # ---- limits

    @property
    def _device_budget(self) -> str:
        return "ram" if self.rates.on_cpu else "vram"

    def _best(self, budgets: Budgets) -> Point | None:
        """The fastest trade within the budgets."""
        limit = getattr(budgets, self._device_budget)
        fitting = [point for point in self._trades(budgets) if limit is None or point.nbytes <= limit]
        return fitting[-1] if fitting else None

    def _with_limit(self, budgets: Budgets, nbytes: int) -> Budgets:
        return replace(budgets, **{self._device_budget: nbytes})

    def _limits(self, budgets: Budgets) -> Limits:
        on_gpu = not self.rates.on_cpu
        return Limits(budgets.ram - self.rates.base if on_gpu and budgets.ram is not None else None, budgets.disk)

    def _groups(self, limits: Limits) -> list[list[Choice]]:
        held = held_by(self.workload, self.rates, self.allow, limits)
        tick = tick_of(self.workload, self.rates)
        return [choices(one, self.workload, self.rates, self.allow, limits, tick) for one in held]

    def _least_host(self, budgets: Budgets) -> int:
        groups = self._groups(self._limits(budgets))
        return self.rates.base + sum(min(one.beside for one in group) for group in groups)

    def _trades(self, budgets: Budgets) -> list[Point]:
        limits, known = self._limits(budgets), self.__dict__["_known"]
        if limits not in known:
            with without_collecting():
                known[limits] = best_trades(self.workload, self.rates, self.allow, limits)
        return known[limits]

    def _refusal(self, budgets: Budgets) -> BudgetError:
        least = self.minimum(budgets)
        smallest = self.choose(least)
        helping = {}
        for name in [one for one in LOSSY if one not in self.allow]:
            other = Planner(self.workload, self.rates, (*self.allow, name))
            helping[name] = other.minimum(budgets)
        on_cpu = self.rates.on_cpu
        advice = explain.advice(budgets, least, helping, on_cpu=on_cpu)
        return BudgetError(explain.refusal(smallest, budgets, least, on_cpu=on_cpu), advice, least)

    # ---- plans

    def _at(self, point: Point, budgets: Budgets) -> Plan:
        rates = self.rates.frugal if point.frugal else None
        return self._plan(point.choices, budgets, rates)

    def _plan(self, chosen: Sequence[Choice], budgets: Budgets, frugal: Rates | None = None) -> Plan:
        held = {one.option.component.name: one.option for one in chosen}
        ways = {stage.name: (stage, way, pace) for one in chosen for stage, way, pace in one.ways}
        rates = frugal or self.rates
        stages = tuple(self._stage(*ways[stage.name], held, rates) for stage in self.workload.stages)
        plan = Plan(
            self.rates.device,
            self.workload.dtype,
            {name: held[name].plan for name in self.workload.components},
            stages,
            budgets,
            self.allow,
            made_for=self.workload.made_for,
            assumed=rates.assumed,
        )
        return replace(plan, why=explain.reasons(plan, self.workload))

    def _stage(self, stage: Stage, way: str, pace: Pace, held: dict[str, Option], rates: Rates) -> StagePlan:
        call = stage.ways[way]
        others = summed(option.kept for name, option in held.items() if name != stage.component)
        weights: Sizes = others + held[stage.component].working
        resting = rates.base + sum(option.host for option in held.values())
        planned = StagePlan(
            stage.name,
            stage.component,
            stage.calls,
            way,
            weights=weights.total,
            mapped=weights.window,
            activations=call.peak - call.workspace,
            workspace=call.workspace,
            carried=stage.carried,
            base=base(rates),
            slack=slack(stage, call, rates),
            host=0 if rates.on_cpu else resting,
            disk=call.stored + sum(option.spilled for option in held.values()),
            seconds=pace.seconds,
            compute_seconds=pace.compute,
            link_seconds=pace.link,
            disk_seconds=pace.disk,
            frugal=rates.gives_back(stage),
        )
        return replace(planned, host=planned.peak) if rates.on_cpu else planned


def _of_scheme(group: list[Choice], scheme: tuple[Level | None, int], way: str) -> Choice:
    """The choice at this level and prefetch without residents or casting, with this way where there is a choice."""

    def matches(one: Choice) -> bool:
        rule = one.option.plan.rule
        level = (None, 0) if rule is None else (rule.level, rule.prefetch)
        return level == scheme and one.option.plan.casting is None and not (rule and rule.resident_bytes)

    def rank(one: Choice) -> tuple[int, int]:
        return sum(taken != (way if way in stage.ways else WHOLE) for stage, taken, _ in one.ways), one.cost

    return min((one for one in group if matches(one)), key=rank)
