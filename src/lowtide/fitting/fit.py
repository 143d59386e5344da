"""Budgets at work on a pipeline: what they are in bytes here, and the plans that keep to them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lowtide.fitting.decode_modes import ways_set
from lowtide.fitting.meta_subject import Twin
from lowtide.measuring.meter import StageReading
from lowtide.measuring.transfers import Flow
from lowtide.memory.attach import attachment_of
from lowtide.memory.rule import Rule
from lowtide.planning.plan import BudgetError, Budgets, Plan
from lowtide.planning.planner import choose
from lowtide.planning.rates import Rates
from lowtide.planning.run_size import RunSize
from lowtide.planning.workload import Workload

LESS = 0.8
"""Of what a stage was to take: what it may take after memory ran out in it."""


@dataclass
class Fit:
    """Budgets at work on a pipeline: what they allow, the plan for the size asked for last, and what happened since.

    `lowered` are the budgets that are left since memory ran out.
    """

    budgets: Budgets
    allow: tuple[str, ...]
    device: torch.device
    rates: Rates
    twin: Twin
    size: RunSize
    plan: Plan
    way_before: tuple[Any, ...] = ()
    rules_before: dict[str, tuple[Rule, torch.device]] = field(default_factory=dict)
    castings: dict[str, str | None] = field(default_factory=dict)
    readings: list[StageReading] = field(default_factory=list)
    flows: dict[str, Flow] = field(default_factory=dict)
    degradations: list[str] = field(default_factory=list)
    lowered: Budgets | None = None

    def plan_for(self, size: RunSize) -> Plan:
        """The fastest plan for a run of this size; raises `BudgetError`, naming the minimum, where there is none.

        What fits no budget that was lowered is tried within those that were given.
        """
        workload = self.twin.workload(size, self.allow)
        if self.lowered is not None:
            with suppress(BudgetError):
                return choose(workload, self.rates, self.lowered, self.allow)
        return choose(workload, self.rates, self.budgets, self.allow)

    def smaller(self, stage: str, *, of_host: bool = False) -> Plan | None:
        """A plan under which a stage takes clearly less than now; where all of the run cannot, this stage alone.

        Less of the device's memory or, on a GPU, `of_host`. None where there is none, or where the plan has no such
        stage.
        """
        now = self.plan.stage(stage)
        if now is None:
            return None
        workload = self.twin.workload(self.size, self.allow)
        if of_host:  # what rests there is there in all stages
            tries = [(workload, most) for most in (int(LESS * now.host), now.host - 1)]
        else:
            limit, peak = now.base + int(LESS * (now.peak - now.base)), self.plan.peak
            withheld = [(_withheld(workload, stage, peak - most), peak) for most in (limit, now.peak - 1)]
            tries = [(workload, limit), *withheld]
        for tried, most in tries:
            with suppress(BudgetError):
                return choose(tried, self.rates, self.limited(most, of_host=of_host), self.allow)
        return None

    def follow(self, before: Fit | None, pipe: Any) -> None:
        """Take over what must be put back one day: from the budgets before, or from the pipeline as it is."""
        if before is not None:
            self.way_before, self.rules_before = before.way_before, before.rules_before
            self.castings = before.castings_of(self.twin)
            return
        self.way_before = ways_set(pipe.vae)
        for name, module in pipe.modules().items():
            if (found := attachment_of(module)) is not None:
                self.rules_before[name] = found.rule, found.device

    def castings_of(self, twin: Twin) -> dict[str, str | None]:
        """The castings of components that another twin has too; those that were replaced have none of ours."""
        return {name: casting for name, casting in self.castings.items() if self.twin.shares(name, twin)}

    @property
    def left(self) -> Budgets:
        """The budgets that are left."""
        return self.lowered or self.budgets

    def limited(self, nbytes: int, *, of_host: bool = False) -> Budgets:
        """The budgets that are left, with so many bytes of the device's memory, or `of_host`."""
        return replace(self.left, **{"ram" if of_host or self.device.type == "cpu" else "vram": nbytes})


def _withheld(workload: Workload, stage: str, nbytes: int) -> Workload:
    """The workload with so many bytes of memory less in one stage."""
    stages = tuple(replace(one, withheld=nbytes) if one.name == stage else one for one in workload.stages)
    return replace(workload, stages=stages)
