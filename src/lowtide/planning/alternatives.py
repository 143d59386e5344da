"""The answer of `lowtide plan`: the chosen plan, other plans to compare, the least memory, what more memory buys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lowtide.casting.casting import INT4
from lowtide.planning.explain import at_least, in_words
from lowtide.planning.plan import LOSSY, BudgetError, Budgets, Plan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from lowtide.planning.planner import Planner
    from lowtide.planning.rates import Rates
    from lowtide.planning.workload import Workload

_USUAL_CHANGES = tuple(name for name in LOSSY if name != INT4)
"""What is proposed to be allowed where nothing else fits; int4 loses ten times what int8 does."""
LEAST_GAIN = 0.002
"""A faster plan is shown only if it saves at least this share of the run's time."""


@dataclass(frozen=True)
class More:
    """The `plan` that is fastest once the budget called `name` is a gigabyte larger: `budget` bytes."""

    name: str
    budget: int
    plan: Plan


@dataclass(frozen=True)
class Outlook:
    """Plans for one run on one machine; `plan` is None where no plan fits the budgets, and `refusal` says why."""

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
    """The least budgets if every lossy form is allowed; None where a plan fits."""

    def plans(self) -> list[tuple[str, Plan]]:
        """The chosen plan and the alternatives by name; of plans that do the same, the first name."""
        others = [(name, plan) for name, plan in self.alternatives.items() if name != "chosen"]
        named = [*([] if self.plan is None else [("chosen", self.plan)]), *others]
        return list({identity(plan): (name, plan) for name, plan in reversed(named)}.values())[::-1]

    def fits(self, plan: Plan) -> bool:
        """Whether a plan fits the budgets."""
        sizes = {"ram": plan.host_peak, "disk": plan.disk}
        if self.device != "cpu":
            sizes["vram"] = plan.peak
        limits = ((getattr(self.budgets, name), size) for name, size in sizes.items())
        return all(limit is None or size <= limit for limit, size in limits)

    def to_dict(self) -> dict[str, Any]:
        """The outlook as a JSON object: sizes in bytes, times in seconds."""
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
                {"budget": more.name, "bytes": more.budget, **summary(more.plan), "saves_seconds": self.saved(more)}
                for more in self.more
            ],
            "curve": [{"budget": budget, **summary(plan)} for budget, plan in self.curve],
            "minimum_if_changed": None if self.minimum_if_changed is None else asdict(self.minimum_if_changed),
            "refusal": self.refusal,
        }

    def saved(self, more: More) -> float | None:
        """Seconds that more memory would save; None where no plan fits the budgets as they are."""
        return None if self.plan is None else self.plan.seconds - more.plan.seconds


def look(workload: Workload, rates: Rates, budgets: Budgets, allow: tuple[str, ...]) -> Outlook:
    """Plan a run and find plans to compare; where nothing fits, the outlook holds the refusal and nothing is raised."""
    from lowtide.planning.planner import Planner

    planner = Planner(workload, rates, allow)  # one planner for all questions: it keeps the trades that it has computed
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
        minimum_if_changed=None if plan else Planner(workload, rates, _USUAL_CHANGES).minimum(budgets),
    )


def thinned(curve: Sequence[tuple[int, Plan]]) -> list[tuple[int, Plan]]:
    """The first and last point of a curve, and points between them that are noticeably faster than the last kept."""
    kept = list(curve[:1])
    for point in curve[1:]:
        if point[1].seconds < kept[-1][1].seconds * (1 - LEAST_GAIN) or point is curve[-1]:
            kept.append(point)
    return kept


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The entries of `Plan.to_dict`, and those of `summary`."""
    return {**summary(plan), **plan.to_dict()}


def summary(plan: Plan) -> dict[str, Any]:
    """A plan in words, and its totals: peaks, disk, time and exactness."""
    totals = ("peak", "host_peak", "disk", "seconds", "exactness")
    return {"words": in_words(plan), **{name: getattr(plan, name) for name in totals}}


def what_to_try(outlook: Outlook) -> str:
    """What to try where no plan fits, in options of the command."""
    tries = [f"Try {_as_options(outlook.minimum, outlook.device)}", "a smaller --size or --batch"]
    changed = outlook.minimum_if_changed
    if changed is not None and changed != outlook.minimum:
        tries += [f"--allow int8 --allow blended_tiling, which needs only {_as_options(changed, outlook.device)}"]
    return ", ".join(tries[:-1]) + f", or {tries[-1]}."


def rounded_up(size: int) -> str:
    """A size rounded up to two decimals, as options take it: "1.24GB"."""
    return f"{-(-size // 10**7) / 100:.2f}GB"


def _as_options(budgets: Budgets, device: str) -> str:
    names = ("ram",) if device == "cpu" else ("vram", "ram")
    sizes = ((name, getattr(budgets, name)) for name in names)
    return " ".join(f"--{name} {rounded_up(size)}" for name, size in sizes if size is not None)


def minimum_in_words(minimum: Budgets, device: str) -> str:
    """The least budgets in words, such as "1.21 GB of GPU memory, with 16.00 GB of host memory"."""
    if device == "cpu":
        return f"{at_least(minimum.ram or 0)} of memory"
    host = "" if minimum.ram is None else f", with {format_decimal(minimum.ram)} of host memory"
    return f"{at_least(minimum.vram or 0)} of GPU memory{host}"


def _more(planner: Planner, budgets: Budgets) -> Iterator[More]:
    for name in ("ram",) if planner.rates.one_memory else ("vram", "ram"):
        if getattr(budgets, name) is None:
            continue
        plan = planner.with_more(budgets, name)
        if plan is not None:
            yield More(name, getattr(plan.budgets, name), plan)


def identity(plan: Plan) -> str:
    """A text that is equal for plans that do the same."""
    return repr((plan.components, [(stage.name, stage.way) for stage in plan.stages]))
