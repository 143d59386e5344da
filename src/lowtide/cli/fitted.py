"""`lowtide generate` within a budget: the plan before the run, a line a step during it, and the report after it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lowtide.cli.errors import tell
from lowtide.cli.live import Sources, StepLines
from lowtide.cli.request import sides
from lowtide.measuring.peaks import device_allocated, resident_memory
from lowtide.measuring.transfers import FlowMeter, ledgers_of, total_flow
from lowtide.progress import ProgressBar

if TYPE_CHECKING:
    from pathlib import Path

    from lowtide.cli.request import Request
    from lowtide.fitting.applied_plan import AppliedPlan
    from lowtide.fitting.subject import Subject
    from lowtide.measuring.meter import Meter
    from lowtide.planning.plan import Plan


class FittedRun:
    """A pipeline that was fitted to a budget, of ours or a guest, and what watches it."""

    def __init__(self, subject: Subject) -> None:
        from lowtide.cli.plan_text import one_line

        self._subject = subject
        self.plan: Plan = self._applied.plan
        tell(one_line(self.plan))
        self._flows = FlowMeter(lambda: total_flow(self._ledgers()))

    def observers(self, *, gathered: bool = False) -> tuple[StepLines, FlowMeter, ProgressBar]:
        """What shows each step, and what keeps the books; steps are looked at before they are shown.

        `gathered` is for stages that take turns and do not know their steps: each has one row for the whole run, and
        the steps that the plan says. The bar is to be closed then.
        """
        on_terminal = sys.stderr.isatty()
        sources = Sources(_in_use(self.plan), lambda: total_flow(self._ledgers()).stalled)
        lines = StepLines(self.plan, sources, None if on_terminal else tell)
        totals = {stage.name: stage.calls for stage in self.plan.stages} if gathered else None
        bar = ProgressBar(note=(lambda: lines.line) if on_terminal else None, totals=totals)
        return lines, self._flows, bar

    def print_report(self, meter: Meter) -> None:
        """Print on stderr what the run took beside what its plan said."""
        from rich.console import Console

        from lowtide.fitting.run_report import run_report

        applied = self._applied
        report = run_report(applied.plan, meter.report(), self._flows.report(), applied.degradations)
        Console(stderr=True).print(report.table())
        for degradation in report.degradations:
            tell(f"Not as planned: {degradation}")
        if applied.rates_note is not None:
            tell(applied.rates_note)

    def _ledgers(self) -> list[Any]:
        return ledgers_of(self._subject.modules().values())

    @property
    def _applied(self) -> AppliedPlan:
        applied = self._subject.applied
        assert applied is not None
        return applied


def write_timeline(meter: Meter, plan: Plan | None, path: Path) -> None:
    """Draw what a meter saw over time beside what a plan predicted, and say where."""
    from lowtide.bench.timeline_plot import plot_timeline

    tell(f"Written: {plot_timeline(meter.timeline(), plan, path)}")


def budget_options(request: Request) -> dict[str, Any]:
    """What `from_pretrained` is told about the budget, and what will be asked for."""
    budget = request.budget
    assert budget is not None
    return {"vram": budget.vram, "ram": budget.ram, "allow": budget.allow, "size": run_size(request)}


def run_size(request: Request) -> dict[str, Any]:
    """What one call is asked for, by the names of `lowtide.planning.run_size.RunSize`."""
    given = sides(request.size, None if request.video is None else request.video.frames)
    output = {} if request.video is not None else {"output": "file"}
    return {**given, **output, "steps": request.steps, "guided": request.guidance > 1}


def _in_use(plan: Plan) -> Any:
    return resident_memory if plan.device == "cpu" else lambda: device_allocated() or 0
