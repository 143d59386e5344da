"""One preparation of plans: what a run takes, what this machine gives, and the budgets, in one place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lowtide.fitting.meta_subject import MetaSubject
from lowtide.fitting.process import process_rates, usual_base, workspaces
from lowtide.fitting.subject import Size
from lowtide.machine.accelerators import is_here
from lowtide.ops.product import BY_ONEDNN
from lowtide.planning.computing_dtype import Kind, slow_warning
from lowtide.planning.machine_rates import assumed_rates, machine_rates
from lowtide.planning.plan import Budgets, Plan
from lowtide.planning.planner import Planner
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Workload
from lowtide.weights.fill import dtype_name

LESS = 0.8
"""Of what a stage was to take: what it may take after memory ran out in it."""


@dataclass(frozen=True)
class Fit:
    """All that plans for runs of one size are made from; `meta` is the subject that was traced for it."""

    meta: MetaSubject
    size: Size
    budgets: Budgets
    allow: tuple[str, ...]
    rates: Rates
    workload: Workload

    @property
    def device(self) -> torch.device:
        """Where runs compute."""
        return self.meta.device

    def choose(self) -> Plan:
        """The fastest plan within the budgets; raises `BudgetError`, naming the minimum, where there is none."""
        return self._planner(self.workload).choose(self.budgets)

    def choose_within(self, lowered: Budgets | None) -> Plan:
        """The fastest plan within budgets that were lowered, or else within those that were given."""
        plan = None if lowered is None else self._planner(self.workload).within(lowered)
        return plan or self.choose()

    def smaller(self, plan: Plan, stage: str, left: Budgets, *, of_host: bool = False) -> Plan | None:
        """A plan under which a stage takes clearly less than under `plan`, within the budgets that are `left`.

        Where all of the run cannot, this stage alone takes less. Less of the device's memory or, on a GPU, `of_host`.
        None where there is none, or where the plan has no such stage.
        """
        planned = plan.stage(stage)
        if planned is None:
            return None
        if of_host:  # what rests there is there in all stages
            tries = [(self.workload, most) for most in (int(LESS * planned.host), planned.host - 1)]
        else:
            limit = planned.base + int(LESS * (planned.peak - planned.base))
            withheld = [_withheld(self.workload, stage, plan.peak - most) for most in (limit, planned.peak - 1)]
            tries = [(self.workload, limit), *((workload, plan.peak) for workload in withheld)]
        for workload, most in tries:
            smaller = self._planner(workload).within(self.limited(left, most, of_host=of_host))
            if smaller is not None:
                return smaller
        return None

    def limited(self, budgets: Budgets, nbytes: int, *, of_host: bool = False) -> Budgets:
        """Budgets with so many bytes of the device's memory, or `of_host`."""
        return replace(budgets, **{"ram" if of_host or self.rates.one_memory else "vram": nbytes})

    def _planner(self, workload: Workload) -> Planner:
        return Planner(workload, self.rates, self.allow)


def prepare(
    meta: MetaSubject,
    budgets: Budgets,
    size: Size,
    *,
    allow: tuple[str, ...] = (),
    loaded: Mapping[str, nn.Module] | None = None,
    rates: Rates | None = None,
) -> Fit:
    """All that plans for runs of this size are made from.

    `loaded` are those networks of the subject that this process has in memory already. `rates` are those of an earlier
    preparation (None: looked up, or measured the first time; a dtype that is slow here is warned of once). Raises
    `ValueError` for a size that cannot be made.
    """
    workload = meta.workload(size, allow)
    if rates is None and meta.device.type == "cpu":
        slow = slow_warning(Kind.of(workload), workload.dtype)
        if slow is not None:
            warnings.warn(f"{slow} It was asked for, or is that of the weights.", stacklevel=4)
    return Fit(meta, size, budgets, allow, rates or _rates(meta, loaded or {}), workload)


def _rates(meta: MetaSubject, loaded: Mapping[str, nn.Module]) -> Rates:
    """Of a device that is not here, usual ones."""
    device, dtype = meta.device, meta.subject.dtype
    if is_here(device):
        fast = _by_onednn(meta)
        rates = process_rates(machine_rates(device, dtype), meta.subject, device, loaded, by_onednn=fast)
        return rates.by_onednn() if fast else rates
    base, context = usual_base(device)
    return replace(assumed_rates(dtype_name(dtype)), base=base, device_base=context, libraries=workspaces(device))


def _by_onednn(meta: MetaSubject) -> bool:
    """Whether oneDNN multiplies in linear layers, as it does in those of our own models."""
    is_there = BY_ONEDNN and meta.device.type == "cpu" and meta.subject.dtype == torch.float32
    modules = (module for network in meta.subject.modules().values() for module in network.modules())
    return is_there and any(getattr(type(module), "only_multiplies", False) for module in modules)


def _withheld(workload: Workload, name: str, nbytes: int) -> Workload:
    """The workload with so many bytes of memory less in one stage."""
    stages = tuple(replace(stage, withheld=nbytes) if stage.name == name else stage for stage in workload.stages)
    return replace(workload, stages=stages)
