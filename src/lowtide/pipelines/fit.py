"""Budgets at work on a pipeline: what they are in bytes here, and the plans that keep to them."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn

from lowtide.memory.budgets import Asked, budget_bytes
from lowtide.memory.costs import Rates, Workload
from lowtide.memory.flow import Flow
from lowtide.memory.host import host_memory, trim_heap
from lowtide.memory.meter import StageReading
from lowtide.memory.plan import BudgetError, Budgets, Plan
from lowtide.memory.planner import choose, minimum
from lowtide.memory.rates import compiled, machine_rates
from lowtide.pipelines.run_size import RunSize
from lowtide.pipelines.workload import Twin

LESS = 0.8
"""Of what a stage was to take: what it may take after memory ran out in it."""


@dataclass
class Fit:
    """Budgets at work on a pipeline: what they allow, the plan for the size asked for last, and what happened since."""

    budgets: Budgets
    allow: tuple[str, ...]
    device: torch.device
    rates: Rates
    twin: Twin
    size: RunSize
    plan: Plan
    way_before: tuple[Any, ...] = ()
    castings: dict[str, str | None] = field(default_factory=dict)
    readings: list[StageReading] = field(default_factory=list)
    flows: dict[str, Flow] = field(default_factory=dict)
    degradations: list[str] = field(default_factory=list)

    def plan_for(self, size: RunSize) -> Plan:
        """The fastest plan for a run of this size; raises `BudgetError`, naming the minimum, where there is none."""
        return choose(self.twin.workload(size, self.allow), self.rates, self.budgets, self.allow)

    def smaller(self, stage: str) -> Plan | None:
        """A plan under which a stage takes clearly less than now, the least at worst; None where that is now."""
        now = next((one for one in self.plan.stages if one.name == stage), None)
        workload = self.twin.workload(self.size, self.allow)
        if now is None:
            return None
        limit = now.base + int(LESS * (now.peak - now.base))
        with suppress(BudgetError):
            return choose(workload, self.rates, self._limited(limit), self.allow)
        alone = replace(workload, stages=tuple(one for one in workload.stages if one.name == stage))
        others = replace(workload, stages=tuple(one for one in workload.stages if one.name != stage))
        plans = [self._least(alone, limit), self._least(others, 0)]
        plan = joined(plans[0], plans[1], [one.name for one in workload.stages])
        return plan if plans[0].peak < now.peak else None

    def _least(self, workload: Workload, limit: int) -> Plan:
        """The fastest plan within a limit, or the smallest one."""
        with suppress(BudgetError):
            return choose(workload, self.rates, self._limited(limit), self.allow)
        least = minimum(workload, self.rates, self.allow, self.budgets)
        return choose(workload, self.rates, least, self.allow)

    def _limited(self, nbytes: int) -> Budgets:
        return replace(self.budgets, **{"ram" if self.device.type == "cpu" else "vram": nbytes})


def joined(first: Plan, second: Plan, order: Sequence[str]) -> Plan:
    """One plan of two for different stages of a run: the components of each as the plan of their stages has them."""
    owned = {stage.component for stage in first.stages}
    components = {**second.components, **{name: one for name, one in first.components.items() if name in owned}}
    stages = sorted((*first.stages, *second.stages), key=lambda stage: order.index(stage.name))
    return replace(first, components=components, stages=tuple(stages), why=(*first.why, *second.why))


def resolved(device: torch.device, vram: Asked, ram: Asked, disk: Asked) -> Budgets:
    """Budgets in bytes on this machine; what is not given is what is free, but for a little."""
    host, own = host_memory(), psutil.Process().memory_info().rss
    free = min(host.available + own, host.total)  # pages of libraries may count for another container
    on_disk = shutil.disk_usage(tempfile.gettempdir())
    return Budgets(
        None if device.type == "cpu" else _vram(device, vram),
        budget_bytes("auto" if ram is None else ram, "ram", total=host.total, free=free),
        budget_bytes("auto" if disk is None else disk, "disk", total=on_disk.total, free=on_disk.free),
    )


def _vram(device: torch.device, asked: Asked) -> int | None:
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return budget_bytes("auto" if asked is None else asked, "vram", total=total, free=free + own)


def rates_here(device: torch.device, dtype: torch.dtype, modules: Mapping[str, nn.Module]) -> Rates:
    """What this machine does in a second, with what this process takes by itself already."""
    rates = machine_rates(device, dtype)
    gc.collect()
    trim_heap()
    own = psutil.Process().memory_info().rss - sum(_in_memory(module) for module in modules.values())
    return replace(rates, base=max(rates.base, own + compiled(dtype)))


def _in_memory(module: nn.Module) -> int:
    """Bytes of weights in this process's memory, at most: those that are not at rest."""
    found = {t.data_ptr(): t.numel() * t.itemsize for t in module.parameters() if type(t) is nn.Parameter and t.is_cpu}
    return sum(found.values())
