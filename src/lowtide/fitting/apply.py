"""What every pipeline can do about all of its memory at once: fit a budget, say its plan, and report what it took."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.cast_module import is_cast
from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.fitting.budgets import Asked, AskedBudgets, resolved, warn_without_gpu
from lowtide.fitting.decode_modes import put_ways_back, set_way
from lowtide.fitting.fit import Fit
from lowtide.fitting.meta_subject import Twin, twin_of
from lowtide.fitting.observers import Heap
from lowtide.fitting.out_of_memory import is_out_of_memory
from lowtide.fitting.process import rates_here
from lowtide.fitting.run_report import RunReport, run_report
from lowtide.machine.heap import steady_malloc, trim_heap
from lowtide.measuring.meter import Meter
from lowtide.measuring.transfers import FlowMeter, ledgers_of, total_flow
from lowtide.memory.attach import attach, attachment_of, detach
from lowtide.memory.presets import execution_device, model_rule, stream_for
from lowtide.planning.plan import ComponentPlan, Plan, check_allowed
from lowtide.planning.planner import choose
from lowtide.planning.run_size import RunSize
from lowtide.sizes import format_decimal
from lowtide.stages import Stages
from lowtide.weights.fill import dtype_name


class FittingMethods:
    """Methods of `DiffusionPipeline` that plan its memory and put plans to work."""

    vae: Any
    stages: Stages
    _fit: Fit | None = None
    _lock: Any
    _is_running: bool

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
        asked = AskedBudgets.of(vram, ram, disk, allow)
        if self._fit is None:
            check_not_cast(self.modules())
        warn_without_gpu(chosen, vram)
        budgets, wanted, twin = resolved(chosen, asked), self.usual_size(**size), self._twin(chosen)
        rates = rates_here(chosen, twin.pipe, self.modules())
        plan = choose(twin.workload(wanted, asked.allow), rates, budgets, asked.allow)
        self.put_under_plan(Fit(budgets, asked.allow, chosen, rates, twin, wanted, plan))
        return plan

    def put_under_plan(self, fit: Fit, *, as_planned: Collection[str] = ()) -> None:
        """Put a plan to work; the components named `as_planned` were loaded under it. All of it or, if that fails,
        what was before. Raises `RuntimeError` while the pipeline is being called.
        """
        with self._lock:
            if self._is_running:
                raise RuntimeError("This pipeline is being called: its budget cannot be changed before that ends.")
            before = self._fit
            fit.follow(before, self)
            planned = {name: one for name, one in fit.plan.components.items() if name in as_planned}
            fit.castings |= {name: one.casting for name, one in planned.items()}
            self._fit = fit
            try:
                self._put_to_work(fit.plan)
            except BaseException:
                self._fit = before  # its plan is put to work again before the next call
                raise

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
        if self._fit is None:
            check_not_cast(self.modules())
        size = self.usual_size(**plan.made_for)
        chosen = execution_device(device or plan.device.partition(":")[0])
        twin = self._twin(chosen)
        dtype = dtype_name(twin.pipe.dtype)
        if plan.dtype != dtype:
            raise ValueError(f"The plan is for {plan.dtype}, and this pipeline computes in {dtype}: make another one.")
        rates = rates_here(chosen, twin.pipe, self.modules())
        self.put_under_plan(Fit(plan.budgets, plan.allow, chosen, rates, twin, size, plan))

    def _twin(self, device: torch.device) -> Twin:
        """The pipeline's twin, made anew where a component was replaced or computes in another dtype since."""
        fit = self._fit
        if fit is not None and fit.twin.device == device and fit.twin.is_of(self):
            return fit.twin
        return twin_of(self, device)

    def unfit(self) -> None:
        """Undo `fit`: no plan, no budget; every weight is where it was before, under the offload that was set then."""
        with self._lock:
            fit = self._fit
            if fit is None:
                return
            for name, module in self.modules().items():
                if fit.castings.get(name) is not None:
                    remove_casting(module)
                detach(module)
                if name in fit.rules_before:
                    rule, device = fit.rules_before[name]
                    attach(module, rule, stream_for(device, rule))
            put_ways_back(self.vae, fit.way_before)
            self._fit = None

    def _prepare(self, size: RunSize) -> None:
        """Before a run: have the plan that its size needs; raises `BudgetError` where there is none.

        It is put to work each time: components may have been moved, replaced, or offloaded by hand in between.
        """
        fit = self._fit
        if fit is None:
            return
        twin = self._twin(fit.device)
        is_known = twin is fit.twin and size == fit.size
        if twin is not fit.twin:
            fit.castings = fit.castings_of(twin)
            fit.twin = twin
        plan = fit.plan if is_known else fit.plan_for(size)
        self._put_to_work(plan)
        fit.size = size

    def _put_to_work(self, plan: Plan) -> None:
        fit = self._fit
        assert fit is not None
        if fit.device.type == "cpu":
            steady_malloc()
        chosen = {name: plan.components.get(name, _UNUSED) for name in self.modules()}
        for name in sorted(chosen, key=lambda one: chosen[one].rule is None):  # first what gives room, then what takes
            put_under(getattr(self, name), chosen[name], fit.castings.get(name), fit.device)
            fit.castings[name] = chosen[name].casting
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

    def _shrink(self, stage: str, reason: str, *, of_host: bool = False) -> bool:
        """After memory ran out in a stage: go on with a plan that takes less, if there is one; whether there was.

        Less of the device's memory, or, on a GPU, `of_host`.
        """
        fit = self._fit
        assert fit is not None
        while (plan := fit.smaller(stage, of_host=of_host)) is not None:
            fit.lowered, fit.plan = fit.limited(plan.host_peak if of_host else plan.peak, of_host=of_host), plan
            try:
                self._put_to_work(plan)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                continue
            taken = plan.stage(stage)
            assert taken is not None
            less = format_decimal(taken.host if of_host else taken.peak)
            said = f"{stage}: memory ran out ({reason}); going on with a plan that takes {less} there"
            fit.degradations.append(said)
            warnings.warn(said, stacklevel=4)
            return True
        return False


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


def check_not_cast(modules: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` for components that rest in 8 bits by hand."""
    cast = [name for name, module in modules.items() if is_cast(module)]
    if cast:
        raise ValueError(
            f"{', '.join(cast)} rest in 8 bits already. Call disable_layerwise_casting on them first, and let the plan "
            "choose: fit(..., allow=('fp8',)) or ('int8',)."
        )


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
