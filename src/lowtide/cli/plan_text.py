"""`lowtide plan` for a terminal: a table of plans, and below it the minimum, the next gigabyte and the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowtide.cli.outlook import LEAST_GAIN, More, Outlook, minimum_in_words
from lowtide.memory.brief import asked_in_words, in_words, seconds_in_words
from lowtide.memory.plan import Plan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_outlook(console: Console, outlook: Outlook, model: str) -> None:
    """Print all of it."""
    for line in headline(outlook, model):
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
    yield f"{model}{what}; on {outlook.device}, with {_budgets(outlook)}"
    if outlook.assumed:
        yield "Times are from assumed rates, not measured ones; memory does not depend on them."


def plans_table(outlook: Outlook) -> Table:
    """One row a plan; an arrow shows the chosen one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    on_cpu = outlook.device == "cpu"
    table = Table(box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    table.add_column("plan", overflow="fold", ratio=1)
    for heading in ("memory",) if on_cpu else ("GPU memory", "host memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result")
    table.add_column("fits")
    for name, plan in outlook.plans():
        style = "bold" if plan is outlook.plan else "" if outlook.fits(plan) else "dim"
        table.add_row(*(Text(cell) for cell in _cells(outlook, name, plan)), style=style)
    return table


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
    on_cpu = outlook.device == "cpu"
    sizes = [_of(plan.host_peak, outlook.budgets.ram)]
    if not on_cpu:
        sizes.insert(0, _of(plan.peak, outlook.budgets.vram))
    fits = "yes" if outlook.fits(plan) else "no"
    mark = "→" if plan is outlook.plan else ""
    said = f"the smallest: {in_words(plan)}" if name == "smallest" else in_words(plan)
    return [mark, said, *sizes, seconds_in_words(plan.seconds), plan.exactness, fits]


def _of(size: int, budget: int | None) -> str:
    """A peak beside its budget: "5.87 of 6.00 GB"."""
    if budget is None:
        return format_decimal(size)
    value, unit = format_decimal(size).split()
    limit, limit_unit = format_decimal(budget).split()
    return f"{value} of {limit} {unit}" if unit == limit_unit else f"{value} {unit} of {limit} {limit_unit}"


def _bought(outlook: Outlook, more: More) -> str:
    budget = f"--{more.name} {more.budget / 1e9:g}GB"
    saved = outlook.saved(more)
    if saved is None or outlook.plan is None:
        return f"{budget} would do: {in_words(more.plan)}, {seconds_in_words(more.plan.seconds)}"
    if saved < LEAST_GAIN * outlook.plan.seconds:
        return f"{budget} would save nothing"
    return f"{budget} would save {seconds_in_words(saved)} ({saved / outlook.plan.seconds:.0%}): {in_words(more.plan)}"


def _budgets(outlook: Outlook) -> str:
    of = {"vram": "GPU memory", "ram": "memory" if outlook.device == "cpu" else "host memory", "disk": "disk"}
    sizes = ((said, getattr(outlook.budgets, name)) for name, said in of.items())
    return ", ".join(f"{format_decimal(size)} of {said}" for said, size in sizes if size is not None) or "no limit"
