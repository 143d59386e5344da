"""What every pipeline can do about all of its memory at once: fit a budget, say its plan, and report what it took."""

from __future__ import annotations

import gc
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import nn

from lowtide.memory.attach import attach, attachment_of, detach
from lowtide.memory.budgets import Asked, budget_bytes, check_budget
from lowtide.memory.costs import Rates, Workload
from lowtide.memory.flow import Flow, FlowMeter, ledgers_of, total_flow
from lowtide.memory.forms import NAMED_CASTINGS
from lowtide.memory.heap import Heap
from lowtide.memory.host import host_memory, trim_heap
from lowtide.memory.meter import Meter, StageReading, steady_malloc
from lowtide.memory.plan import BudgetError, Budgets, ComponentPlan, Plan, check_allowed
from lowtide.memory.planner import choose
from lowtide.memory.presets import apply_casting, execution_device, model_rule, remove_casting, stream_for
from lowtide.memory.rates import COMPILED, machine_rates
from lowtide.memory.report import RunReport, run_report
from lowtide.memory.twin import dtypes_in_files, is_cast
from lowtide.pipelines.run_size import RunSize
from lowtide.pipelines.workload import Twin, put_ways_back, set_way, twin_of, ways_set
from lowtide.sizes import format_decimal
from lowtide.stages import Stages

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
    castings: dict[str, str | None] = field(default_factory=dict)
    readings: list[StageReading] = field(default_factory=list)
    flows: dict[str, Flow] = field(default_factory=dict)
    degradations: list[str] = field(default_factory=list)
    lowered: Budgets | None = None

    def plan_for(self, size: RunSize) -> Plan:
        """The fastest plan for a run of this size; raises `BudgetError`, naming the minimum, where there is none.

        What fits no budget that was lowered is tried within those that were given.
        """
        workload = self.twin.workload(size)
        if self.lowered is not None:
            with suppress(BudgetError):
                return choose(workload, self.rates, self.lowered, self.allow)
        return choose(workload, self.rates, self.budgets, self.allow)

    def smaller(self, stage: str) -> Plan | None:
        """A plan under which a stage takes clearly less than now; where all of the run cannot, this stage alone.

        None where there is none, or where the plan has no such stage.
        """
        now = next((one for one in self.plan.stages if one.name == stage), None)
        if now is None:
            return None
        limit, workload = int(now.peak * LESS), self.twin.workload(self.size)
        yet = [(workload, limit)]
        yet += [(_withheld(workload, stage, self.plan.peak - most), self.plan.peak) for most in (limit, now.peak - 1)]
        for tried, most in yet:
            with suppress(BudgetError):
                return choose(tried, self.rates, self.limited(most), self.allow)
        return None

    def limited(self, nbytes: int) -> Budgets:
        """The budgets with so many bytes of the device's memory."""
        return replace(self.budgets, **{"ram" if self.device.type == "cpu" else "vram": nbytes})


def _withheld(workload: Workload, stage: str, nbytes: int) -> Workload:
    """The workload with so many bytes of memory less in one stage."""
    stages = tuple(replace(one, withheld=nbytes) if one.name == stage else one for one in workload.stages)
    return replace(workload, stages=stages)


class FittingMethods:
    """Methods of `DiffusionPipeline` that plan its memory and put plans to work."""

    vae: Any
    stages: Stages
    _fit: Fit | None = None

    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        raise NotImplementedError

    def usual_size(self, **asked: Any) -> RunSize:
        """The size of a run where nothing else is said: the model's own, or what of it is `asked` otherwise."""
        raise NotImplementedError

    def fit(
        self,
        vram: Asked = None,
        ram: Asked = None,
        *,
        disk: Asked = None,
        allow: Collection[str] = (),
        device: torch.device | str | None = None,
        **size: Any,
    ) -> Plan:
        """Keep within budgets of bytes from now on, whatever is asked for, as fast as they allow; see `lowtide.fit`."""
        chosen = execution_device(device)
        for name, asked in (("vram", vram), ("ram", ram), ("disk", disk)):
            check_budget(asked, name)
        check_allowed(allow)
        cast = [] if self._fit is not None else [name for name, module in self.modules().items() if is_cast(module)]
        if cast:
            raise ValueError(
                f"{', '.join(cast)} rest in 8 bits already. Call disable_layerwise_casting on them first, and let the "
                "plan choose: fit(..., allow=('fp8',)) or ('int8',)."
            )
        if chosen.type == "cpu" and vram is not None:
            warnings.warn(f"vram={vram!r} has no effect: there is no GPU here, and all memory is ram.", stacklevel=2)
        twin = self._fit.twin if self._fit is not None else twin_of(self, chosen, _in_files(self.modules()))
        self._begin_fit(twin, resolved(chosen, vram, ram, disk), tuple(allow), chosen, self.usual_size(**size))
        return self.plan  # type: ignore[return-value]

    def _begin_fit(
        self, twin: Twin, budgets: Budgets, allow: tuple[str, ...], device: torch.device, size: RunSize
    ) -> None:
        rates = rates_here(device, twin.pipe.dtype, self.modules())
        plan = choose(twin.workload(size), rates, budgets, allow)
        self.put_under_plan(Fit(budgets, allow, device, rates, twin, size, plan))

    def put_under_plan(self, fit: Fit, *, as_planned: Collection[str] = ()) -> None:
        """Put a plan to work; the components named `as_planned` were loaded under it."""
        before = self._fit
        fit.way_before = ways_set(self.vae) if before is None else before.way_before
        fit.castings = {} if before is None else before.castings
        fit.castings |= {name: fit.plan.components[name].casting for name in as_planned if name in fit.plan.components}
        self._fit = fit
        self._put_to_work(fit.plan)

    @property
    def plan(self) -> Plan | None:
        """The plan at work, for the size asked for last; None where no budget was given."""
        return None if self._fit is None else self._fit.plan

    def report(self) -> RunReport:
        """What the last run took beside what its plan said, stage by stage; print it, or take its `to_dict`.

        Raises `RuntimeError` where no budget was given, or nothing has run since.
        """
        if self._fit is None or not self._fit.readings:
            reason = "no budget was given: call pipe.fit(...) first" if self._fit is None else "nothing has run since"
            raise RuntimeError(f"There is nothing to report, since {reason}.")
        return run_report(self._fit.plan, self._fit.readings, self._fit.flows, self._fit.degradations)

    @property
    def degradations(self) -> list[str]:
        """What was made smaller since a budget was given, because memory ran out; in words, in order."""
        return [] if self._fit is None else list(self._fit.degradations)

    def apply_plan(self, plan: Plan, device: torch.device | str | None = None) -> None:
        """Put a plan to work, such as one saved as JSON; calls of another size than its own are planned anew.

        Raises `ValueError` for a plan of components that this pipeline has not, or of another dtype.
        """
        unknown = sorted(set(plan.components) - set(self.modules()))
        if unknown:
            raise ValueError(f"The plan has {unknown}, and this pipeline has {', '.join(self.modules())}.")
        check_allowed(plan.allow)
        size = self.usual_size(**plan.made_for)
        chosen = execution_device(device or plan.device.partition(":")[0])
        twin = self._fit.twin if self._fit is not None else twin_of(self, chosen, _in_files(self.modules()))
        dtype = str(twin.pipe.dtype).removeprefix("torch.")
        if plan.dtype != dtype:
            raise ValueError(f"The plan is for {plan.dtype}, and this pipeline computes in {dtype}: make another one.")
        rates = rates_here(chosen, twin.pipe.dtype, self.modules())
        self.put_under_plan(Fit(plan.budgets, plan.allow, chosen, rates, twin, size, plan))

    def unfit(self) -> None:
        """Undo `fit`: no plan, no budget, and every weight where it was before."""
        if self._fit is None:
            return
        for name, module in self.modules().items():
            if self._fit.castings.get(name) is not None:
                remove_casting(module)
            detach(module)
        put_ways_back(self.vae, self._fit.way_before)
        self._fit = None

    def _prepare(self, size: RunSize) -> None:
        """Before a run: have the plan that its size needs; raises `BudgetError` where there is none.

        It is put to work each time: components may have been moved, replaced, or offloaded by hand in between.
        """
        fit = self._fit
        if fit is None:
            return
        plan = fit.plan if size == fit.size else fit.plan_for(size)
        self._put_to_work(plan)
        fit.size = size

    def _put_to_work(self, plan: Plan) -> None:
        fit = self._fit
        assert fit is not None
        if fit.device.type == "cpu":
            steady_malloc()
        for name, module in self.modules().items():
            chosen = plan.components.get(name, _UNUSED)
            put_under(module, chosen, fit.castings.get(name), fit.device)
            fit.castings[name] = chosen.casting
        set_way(self.vae, plan.way("decode"))
        fit.plan = plan
        trim_heap()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Bracket a run under a plan: what it takes is measured, by a meter that watches already or by one of ours."""
        fit = self._fit
        if fit is None:
            yield
            return
        meter = next((one for one in self.stages.observers if isinstance(one, Meter)), None)
        ours = Meter() if meter is None else meter
        seen = len(ours.report())
        flows = FlowMeter(lambda: total_flow(ledgers_of(self.modules().values())))
        watching = (Heap(lambda: fit.plan),) if fit.device.type == "cpu" else ()
        try:
            with self.stages.observed(flows, *watching, *([ours] if meter is None else [])):
                yield
        finally:
            fit.readings, fit.flows = ours.report()[seen:], dict(flows.report())

    def _shrink(self, stage: str, reason: str) -> bool:
        """After memory ran out in a stage: go on with a plan that takes less, if there is one; whether there was."""
        fit = self._fit
        assert fit is not None
        plan = fit.smaller(stage)
        if plan is None:
            return False
        fit.lowered = fit.limited(plan.peak)
        self._put_to_work(plan)
        taken = next(one.peak for one in plan.stages if one.name == stage)
        said = f"{stage}: memory ran out ({reason}); going on with a plan that takes {format_decimal(taken)} there"
        fit.degradations.append(said)
        warnings.warn(said, stacklevel=4)
        return True


_UNUSED = ComponentPlan()


def put_under(module: nn.Module, chosen: ComponentPlan, casting_now: str | None, device: torch.device) -> None:
    """Have one component as a plan says; one that the plan does not know comes as a whole when it is called."""
    if chosen.casting != casting_now:
        if casting_now is not None:
            remove_casting(module)
        if chosen.casting is not None:
            apply_casting(module, casting_for(module, chosen.casting))
    rule = model_rule(device) if chosen is _UNUSED else chosen.rule
    found = attachment_of(module)
    if rule is None:
        detach(module)
        module.to(device)
    elif found is None or found.rule != rule or found.device != device:
        attach(module, rule, stream_for(device, rule))


def casting_for(module: Any, name: str) -> Any:
    """The casting called so, without the parts that the model says are never cast."""
    casting = NAMED_CASTINGS[name]
    return replace(casting, skip_patterns=(*casting.skip_patterns, *getattr(module, "never_cast", ())))


def resolved(device: torch.device, vram: Asked, ram: Asked, disk: Asked) -> Budgets:
    """Budgets in bytes on this machine; what is not given is what is free, but for a little."""
    host, own = host_memory(), psutil.Process().memory_info().rss
    on_disk = shutil.disk_usage(tempfile.gettempdir())
    return Budgets(
        None if device.type == "cpu" else _vram(device, vram),
        budget_bytes("auto" if ram is None else ram, "ram", total=host.total, free=host.available + own),
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
    return replace(rates, base=max(rates.base, own + COMPILED))


def _in_memory(module: nn.Module) -> int:
    """Bytes of weights in this process's memory, at most: those that are not at rest."""
    found = {t.data_ptr(): t.numel() * t.itemsize for t in module.parameters() if type(t) is nn.Parameter and t.is_cpu}
    return sum(found.values())


def _in_files(modules: Mapping[str, nn.Module]) -> dict[str, Mapping[str, torch.dtype] | None]:
    return {name: dtypes_in_files(module) for name, module in modules.items()}


def fit(
    pipe: FittingMethods,
    vram: Asked = None,
    ram: Asked = None,
    *,
    disk: Asked = None,
    allow: Collection[str] = (),
    device: torch.device | str | None = None,
    **size: Any,
) -> Plan:
    """Have a pipeline keep within budgets of bytes, as fast as they allow, and return the plan.

    `vram` is what may be in use on the GPU, `ram` the memory of the whole process (on a machine without a GPU, where
    weights stay on disk until they are needed, it is all there is), `disk` what temporary files may take. Each is a
    number of bytes, text such as "4GB", a share of what there is ("80%"), "auto" for what is free less a tenth, or
    "-1GB" for what is free less 1 GB; None is "auto". `allow` names what may change the result: "fp8", "int8",
    "blended_tiling"; without it every plan gives the plain run's result, bit for bit, or up to rounding where pictures
    are decoded row by row. `size` says what will be asked for (`height`, `width`, `pictures`, `steps`, `frames`); calls
    of another size are planned anew before they begin. Budgets may be changed between calls by calling this again;
    `pipe.unfit()` undoes it.
    Raises `BudgetError`, naming the minimum, where no plan fits, and `ValueError` for what is not possible.
    """
    return pipe.fit(vram, ram, disk=disk, allow=allow, device=device, **size)
