"""The line that a run under a budget shows at every step: its seconds, the physical bound, memory, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.planning.plan import Plan, StagePlan

LINES_A_STAGE = 10
"""How many lines a stage leaves, at most about, where they are printed one below the other."""


@dataclass(frozen=True)
class Sources:
    """Where the figures come from: seconds on a clock, bytes in use, and seconds that computing waited so far."""

    in_use: Callable[[], int]
    stalled: Callable[[], float]
    clock: Callable[[], float] = time.perf_counter


@dataclass
class _Open:
    name: str
    steps: int | None
    at: float
    stalled: float
    line: str = ""


class StepLines:
    """An observer of stages that says after each step what it took, as `line` of the innermost stage.

    Where `show` is given it gets a line about every tenth of a planned stage's steps, for where none can be redrawn. A
    stage that does not know its steps has those of its plan, in all of its visits together.
    """

    def __init__(self, plan: Plan, sources: Sources, show: Callable[[str], None] | None = None) -> None:
        self._plans = {stage.name: stage for stage in plan.stages}
        self._memory = "RAM" if plan.device == "cpu" else "GPU"
        self._budget = plan.budgets.ram if plan.device == "cpu" else plan.budgets.vram
        self._sources = sources
        self._show = show
        self._open: list[_Open] = []
        self._done: dict[str, int] = {}
        """Steps of earlier visits of stages that do not know their steps."""

    @property
    def line(self) -> str:
        """What the last step of the innermost stage took; empty before its first one has ended."""
        return self._open[-1].line if self._open else ""

    def stage_started(self, name: str, steps: int | None) -> None:
        """Begin to watch a stage."""
        self._open.append(_Open(name, steps, self._sources.clock(), self._sources.stalled()))

    def step_done(self, name: str, step: int) -> None:
        """Look at what the step took."""
        stage = self._open[-1]
        now, stalled = self._sources.clock(), self._sources.stalled()
        seconds, waited = now - stage.at, max(stalled - stage.stalled, 0.0)
        stage.at, stage.stalled = now, stalled
        stage.line = self._said(stage, seconds, waited)
        if self._show is None or name not in self._plans:
            return
        steps = stage.steps
        if steps is None:
            steps = self._plans[name].calls
            self._done[name] = step = self._done.get(name, 0) + 1
        if _is_due(step, steps):
            self._show(f"{name} {step}/{steps} {stage.line}")

    def stage_finished(self, name: str) -> None:
        """End with the stage."""
        self._open.pop()

    def _said(self, stage: _Open, seconds: float, waited: float) -> str:
        parts = [f"{seconds:.2f} s", _bound(self._plans.get(stage.name), stage.steps), self._use()]
        stall = f"stall {100 * min(waited / seconds, 1.0) if seconds > 0 else 0:.0f} %"
        return " ".join(part for part in [*parts, stall] if part)

    def _use(self) -> str:
        used = self._sources.in_use() / 1e9
        return f"{self._memory} {used:.2f}" + (" GB" if self._budget is None else f"/{self._budget / 1e9:.2f} GB")


def _bound(plan: StagePlan | None, steps: int | None) -> str:
    """The physical limit of a step: its share of the stage's."""
    return "" if plan is None else f"(bound {plan.least_seconds / (steps or plan.calls):.2f} {plan.bound})"


def _is_due(step: int, steps: int) -> bool:
    """Whether this step begins another tenth of the steps, or is the first one or the last one."""
    tenth = step * LINES_A_STAGE // steps
    return step in (1, steps) or tenth > (step - 1) * LINES_A_STAGE // steps
