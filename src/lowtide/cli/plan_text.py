"""`lowtide plan` for a terminal: a table of plans, and below it the minimum, the next gigabyte and the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowtide.planning.alternatives import LEAST_GAIN, More, Outlook, identity, minimum_in_words
from lowtide.planning.explain import asked_in_words, budgets_in_words, in_words, seconds_in_words
from lowtide.planning.plan import Plan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


NOTICED = 0.98
"""A plan is shown beside faster ones where it takes at most so much of their memory."""


def print_outlook(console: Console, outlook: Outlook, model: str) -> None:
    """Print all of it."""
    for line in (*headline(outlook, model), *chosen_in_words(outlook)):
        console.print(line, markup=False, soft_wrap=True)
    console.print(plans_table(outlook))
    for name, lines in below(outlook).items():
        console.print(name, style="bold")
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)


def headline(outlook: Outlook, model: str) -> Iterator[str]:
    """What is planned, and on which machine."""
    plan = next((plan for _, plan in outlook.plans()), None)
    what = "" if plan is None else f": {asked_in_words(plan)}, {plan.dtype}"
    on_cpu = outlook.device == "cpu"
    yield f"{model}{what}, on {'the CPU' if on_cpu else outlook.device}"
    yield f"Given:   {budgets_in_words(outlook.budgets, on_cpu=on_cpu)}"
    if outlook.assumed:
        yield "Times are from assumed rates, not measured ones; memory does not depend on them."


def chosen_in_words(outlook: Outlook) -> Iterator[str]:
    """The chosen plan, and what it takes of each budget."""
    plan, budgets = outlook.plan, outlook.budgets
    if plan is None:
        return
    sizes = f"{_of(plan.host_peak, budgets.ram)} of memory"
    if outlook.device != "cpu":
        sizes = f"{_of(plan.peak, budgets.vram)} of GPU memory, {_of(plan.host_peak, budgets.ram)} of host memory"
    yield f"Chosen:  {in_words(plan)}"
    yield f"         {sizes}, {seconds_in_words(plan.seconds)}, {plan.exactness}"


def plans_table(outlook: Outlook) -> Table:
    """One row a plan, the largest first; an arrow shows the chosen one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    on_cpu = outlook.device == "cpu"
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    for heading in ("memory",) if on_cpu else ("GPU", "host"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result")
    table.add_column("fits", no_wrap=True)
    for name, plan in shown_plans(outlook):
        style = "bold" if plan is outlook.plan else "" if outlook.fits(plan) else "dim"
        table.add_row(*(Text(cell) for cell in _cells(outlook, name, plan)), style=style)
    return table


def shown_plans(outlook: Outlook) -> list[tuple[str, Plan]]:
    """The chosen plan and the smallest, and of the others those that no faster and as exact one makes needless.

    The chosen one has the name of the usual plan that it is, or "chosen".
    """
    names = {id(plan): _name_of(outlook, name, plan) for name, plan in outlook.plans()}
    kept: list[Plan] = []
    for _, plan in sorted(outlook.plans(), key=lambda named: (named[1].seconds, named[1].peak)):
        as_exact = [other for other in kept if _inexactness(other) <= _inexactness(plan)]
        if plan is outlook.plan or names[id(plan)] == "smallest" or all(_is_smaller(plan, other) for other in as_exact):
            kept.append(plan)
    return [(names[id(plan)], plan) for plan in sorted(kept, key=lambda plan: -plan.peak)]


def below(outlook: Outlook) -> dict[str, list[str]]:
    """What is said below the table, by its heading."""
    said = {"Minimum": [minimum_in_words(outlook.minimum, outlook.device)]}
    if outlook.more:
        said["One gigabyte more"] = [_bought(outlook, more) for more in outlook.more]
    if outlook.plan is not None and outlook.plan.why:
        said["Why"] = list(outlook.plan.why)
    return said


def one_line(plan: Plan) -> str:
    """A plan before it is put to work."""
    host = "" if plan.device == "cpu" else f", host {format_decimal(plan.host_peak)}"
    rates = " (assumed rates)" if plan.assumed else ""
    budget = plan.budgets.ram if plan.device == "cpu" else plan.budgets.vram
    of = "" if budget is None else f" of {format_decimal(budget)}"
    peak = f"peak {format_decimal(plan.peak)}{of}{host}"
    return f"Plan: {in_words(plan)}\n      {peak}, about {seconds_in_words(plan.seconds)}{rates}, {plan.exactness}"


def _cells(outlook: Outlook, name: str, plan: Plan) -> list[str]:
    sizes = [format_decimal(plan.host_peak)]
    if outlook.device != "cpu":
        sizes.insert(0, format_decimal(plan.peak))
    mark = "→" if plan is outlook.plan else ""
    result = plan.exactness.removeprefix("exact up to ")  # a line has 80 columns
    return [mark, name, *sizes, seconds_in_words(plan.seconds), result, "yes" if outlook.fits(plan) else "no"]


def _name_of(outlook: Outlook, name: str, plan: Plan) -> str:
    """The short name of a plan; the chosen one may be a usual one too."""
    if plan is not outlook.plan:
        return name
    same = [
        usual
        for usual, other in outlook.alternatives.items()
        if usual != "chosen" and identity(other) == identity(plan)
    ]
    return next(iter(same), name)


def _inexactness(plan: Plan) -> int:
    return ("equal bits", "exact up to rounding").index(plan.exactness) if "changed" not in plan.exactness else 2


def _is_smaller(plan: Plan, other: Plan) -> bool:
    """Whether a plan takes noticeably less, on the device or in host memory."""
    return plan.peak < other.peak * NOTICED or plan.host_peak < other.host_peak * NOTICED


def _of(size: int, budget: int | None) -> str:
    """A peak beside its budget: "5.87 of 6.00 GB"."""
    if budget is None:
        return format_decimal(size)
    value, unit = format_decimal(size).split()
    limit, limit_unit = format_decimal(budget).split()
    return f"{value} of {limit} {unit}" if unit == limit_unit else f"{value} {unit} of {limit} {limit_unit}"


def _bought(outlook: Outlook, more: More) -> str:
    budget = f"--{more.name} {_typed(more.budget)}"
    saved = outlook.saved(more)
    if saved is None or outlook.plan is None:
        return f"{budget} would do: {in_words(more.plan)}, {seconds_in_words(more.plan.seconds)}"
    if saved < LEAST_GAIN * outlook.plan.seconds:
        return f"{budget} would save nothing"
    share = saved / outlook.plan.seconds
    said = f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
    return f"{budget} would save {seconds_in_words(saved)} ({said}): {in_words(more.plan)}"


def _typed(size: int) -> str:
    """A size as an option takes it: "2GB", "23.04GB"."""
    return f"{round(size / 1e9, 2):g}GB"
