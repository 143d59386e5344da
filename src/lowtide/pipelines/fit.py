"""Budgets at work on a pipeline: what they are in bytes here, and the plans that keep to them."""

from __future__ import annotations

import gc
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowtide.memory.attach import attachment_of
from lowtide.memory.budgets import Asked, budget_bytes, check_budget
from lowtide.memory.costs import Rates, Workload
from lowtide.memory.flow import Flow
from lowtide.memory.forms import Rule
from lowtide.memory.host import host_memory, trim_heap
from lowtide.memory.meter import StageReading
from lowtide.memory.peaks import resident_memory
from lowtide.memory.plan import BudgetError, Budgets, Plan, check_allowed
from lowtide.memory.planner import choose
from lowtide.memory.rates import compiled, machine_rates, objects
from lowtide.pipelines.run_size import RunSize
from lowtide.pipelines.workload import Twin, nbytes, ways_set

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


@dataclass(frozen=True)
class AskedBudgets:
    """Budgets as they were given, and what may change the result; see `lowtide.fit`."""

    vram: Asked = None
    ram: Asked = None
    disk: Asked = None
    allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, vram: Asked, ram: Asked, disk: Asked, allow: Collection[str]) -> AskedBudgets:
        """What was given, checked; raises `ValueError` for what means nothing."""
        for name, asked in (("vram", vram), ("ram", ram), ("disk", disk)):
            check_budget(asked, name)
        check_allowed(allow)
        return cls(vram, ram, disk, tuple(allow))

    @property
    def are_given(self) -> bool:
        """Whether there is any."""
        return any(one is not None for one in (self.vram, self.ram, self.disk))


def resolved(device: torch.device, asked: AskedBudgets) -> Budgets:
    """Budgets in bytes on this machine; what is not given is what is free, but for a little."""
    host, own = host_memory(), resident_memory()
    free = min(host.available + own, host.total)  # pages of libraries may count for another container
    on_disk = shutil.disk_usage(tempfile.gettempdir())
    return Budgets(
        None if device.type == "cpu" else _vram(device, asked.vram),
        budget_bytes("auto" if asked.ram is None else asked.ram, "ram", total=host.total, free=free),
        budget_bytes("auto" if asked.disk is None else asked.disk, "disk", total=on_disk.total, free=on_disk.free),
    )


def _vram(device: torch.device, asked: Asked) -> int | None:
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return budget_bytes("auto" if asked is None else asked, "vram", total=total, free=free + own)


def rates_here(device: torch.device, pipe: Any, modules: Mapping[str, nn.Module]) -> Rates:
    """What this machine does in a second, with what the process takes for a pipeline beside weights and activations.

    `pipe` may be on meta; `modules` are those of its networks that this process has in memory already.
    """
    rates, weights = machine_rates(device, pipe.dtype), sum(_in_memory(module) for module in modules.values())
    vocabulary = getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "vocab_size", 0)
    usual = rates.base + objects(vocabulary)
    own = resident_memory() - weights
    if own > usual:
        gc.collect()
        trim_heap()
        own = resident_memory() - weights
    whole = nbytes(*(one for module in pipe.modules().values() for one in module.parameters()))
    steady = _steady((device.type, pipe.dtype, vocabulary), max(usual, own))
    return replace(rates, base=steady + compiled(pipe.dtype, whole))


def _steady(key: tuple[str, torch.dtype, int], base: int) -> int:
    """What the process takes by itself: the figure of before, unless it has clearly grown, so that plans repeat."""
    known = _bases.get(key)
    if known is None or base > known + CREEP:
        _bases[key] = base
    return _bases[key]


_bases: dict[tuple[str, torch.dtype, int], int] = {}
CREEP = 64 * 2**20
"""Bytes that kernels, once they are compiled, and memory between two collections add to a process: no news."""


def _in_memory(module: nn.Module) -> int:
    """Bytes of weights in this process's memory, at most: those that are not at rest, and those that stay."""
    found = {t.data_ptr(): t.numel() * t.itemsize for t in module.parameters() if type(t) is nn.Parameter and t.is_cpu}
    attachment = attachment_of(module)
    return sum(found.values()) + (0 if attachment is None else attachment.stream.ledger.in_use)


def warn_without_gpu(device: torch.device, vram: Asked) -> None:
    """Say that a budget of a GPU's memory has no effect where there is none."""
    if device.type == "cpu" and vram is not None:
        warnings.warn(f"vram={vram!r} has no effect: there is no GPU here, and all memory is ram.", stacklevel=4)
