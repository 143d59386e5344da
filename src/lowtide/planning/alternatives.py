"""What `lowtide plan` finds: the chosen plan, others beside it, the minimum, and what more memory would buy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lowtide.planning.explain import at_least, in_words
from lowtide.planning.plan import LOSSY, BudgetError, Budgets, Plan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from lowtide.planning.planner import Planner
    from lowtide.planning.rates import Rates
    from lowtide.planning.workload import Workload

LEAST_GAIN = 0.002
"""The share of a run's time that makes a faster plan one that is shown."""


@dataclass(frozen=True)
class More:
    """What a gigabyte more of one budget would buy: the `plan` that it allows."""

    name: str
    budget: int
    plan: Plan


@dataclass(frozen=True)
class Outlook:
    """Plans for one run on one machine; `plan` is None where no plan keeps the budgets, and `refusal` says why."""

    device: str
    budgets: Budgets
    plan: Plan | None
    alternatives: Mapping[str, Plan]
    minimum: Budgets
    more: tuple[More, ...]
    curve: tuple[tuple[int, Plan], ...]
    assumed: bool
    refusal: str | None = None
    minimum_if_changed: Budgets | None = None
    """The minimum if the result may change."""

    def plans(self) -> list[tuple[str, Plan]]:
        """The chosen plan first, then those beside it by their names; each once."""
        beside = [(name, plan) for name, plan in self.alternatives.items() if name != "chosen"]
        found = [*([] if self.plan is None else [("chosen", self.plan)]), *beside]
        return list({identity(plan): (name, plan) for name, plan in reversed(found)}.values())[::-1]

    def fits(self, plan: Plan) -> bool:
        """Whether a plan keeps the budgets."""
        taken = {"ram": plan.host_peak, "disk": plan.disk}
        if self.device != "cpu":
            taken["vram"] = plan.peak
        limits = ((getattr(self.budgets, name), size) for name, size in taken.items())
        return all(limit is None or size <= limit for limit, size in limits)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it: sizes in bytes, times in seconds."""
        return {
            "device": self.device,
            "assumed_rates": self.assumed,
            "budgets": asdict(self.budgets),
            "chosen": None if self.plan is None else plan_dict(self.plan),
            "alternatives": [
                {"name": name, "fits": self.fits(plan), **plan_dict(plan)}
                for name, plan in self.plans()
                if plan is not self.plan
            ],
            "minimum": asdict(self.minimum),
            "next_gigabyte": [
                {"budget": one.name, "bytes": one.budget, **summary(one.plan), "saves_seconds": self.saved(one)}
                for one in self.more
            ],
            "curve": [{"budget": budget, **summary(plan)} for budget, plan in self.curve],
            "minimum_if_changed": None if self.minimum_if_changed is None else asdict(self.minimum_if_changed),
            "refusal": self.refusal,
        }

    def saved(self, more: More) -> float | None:
        """Seconds that a run would be shorter with more memory; None where nothing fits without."""
        return None if self.plan is None else self.plan.seconds - more.plan.seconds


def look(workload: Workload, rates: Rates, budgets: Budgets, allow: tuple[str, ...]) -> Outlook:
    """Plan a run, and what is beside the plan; a refusal is part of the answer."""
    from lowtide.planning.planner import Planner

    planner = Planner(workload, rates, allow)  # one for all questions: what it has found it keeps
    plan, refusal = None, None
    try:
        plan = planner.choose(budgets)
    except BudgetError as error:
        refusal = error.reason
    return Outlook(
        device=rates.device,
        budgets=budgets,
        plan=plan,
        alternatives=planner.alternatives(budgets),
        minimum=planner.minimum(budgets),
        more=tuple(_more(planner, budgets)),
        curve=tuple(thinned(planner.curve(budgets))),
        assumed=rates.assumed,
        refusal=refusal,
        minimum_if_changed=None if plan else Planner(workload, rates, LOSSY).minimum(budgets),
    )


def thinned(curve: Sequence[tuple[int, Plan]]) -> list[tuple[int, Plan]]:
    """The ends of a curve, and of what is between them the plans that are noticeably faster than the one before."""
    kept = list(curve[:1])
    for point in curve[1:]:
        if point[1].seconds < kept[-1][1].seconds * (1 - LEAST_GAIN) or point is curve[-1]:
            kept.append(point)
    return kept


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as `Plan.to_dict` has it, and what follows from it."""
    return {**summary(plan), **plan.to_dict()}


def summary(plan: Plan) -> dict[str, Any]:
    """What a plan comes to, its parts left out."""
    sums = ("peak", "host_peak", "disk", "seconds", "exactness")
    return {"words": in_words(plan), **{name: getattr(plan, name) for name in sums}}


def what_to_try(outlook: Outlook) -> str:
    """What would help where no plan fits, as options."""
    tries = [f"Try {_as_options(outlook.minimum, outlook.device)}", "a smaller --size or --batch"]
    changed = outlook.minimum_if_changed
    if changed is not None and changed != outlook.minimum:
        tries += [f"--allow int8 --allow blended_tiling, with which {_as_options(changed, outlook.device)} would do"]
    return ", ".join(tries[:-1]) + f", or {tries[-1]}."


def rounded_up(size: int) -> str:
    """A size with two decimals that is not below it, as options take it: "1.24GB"."""
    return f"{-(-size // 10**7) / 100:.2f}GB"


def _as_options(budgets: Budgets, device: str) -> str:
    names = ("ram",) if device == "cpu" else ("vram", "ram")
    sizes = ((name, getattr(budgets, name)) for name in names)
    return " ".join(f"--{name} {rounded_up(size)}" for name, size in sizes if size is not None)


def minimum_in_words(minimum: Budgets, device: str) -> str:
    """The least that would do, such as "1.21 GB of GPU memory, with 16.00 GB of host memory"."""
    if device == "cpu":
        return f"{at_least(minimum.ram or 0)} of memory"
    host = "" if minimum.ram is None else f", with {format_decimal(minimum.ram)} of host memory"
    return f"{at_least(minimum.vram or 0)} of GPU memory{host}"


def _more(planner: Planner, budgets: Budgets) -> Iterator[More]:
    for name in ("ram",) if planner.rates.on_cpu else ("vram", "ram"):
        if getattr(budgets, name) is None:
            continue
        with suppress(BudgetError):
            plan = planner.with_more(budgets, name)
            yield More(name, getattr(plan.budgets, name), plan)


def identity(plan: Plan) -> str:
    """What a plan does: equal for plans that do the same."""
    return repr((plan.components, [(stage.name, stage.way) for stage in plan.stages]))
