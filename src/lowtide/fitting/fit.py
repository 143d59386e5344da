"""Budgets for a subject: give one, put a saved plan to work, keep to it in every call, and undo it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lowtide.casting.cast_module import is_cast
from lowtide.fitting.applied_plan import put_under_plan
from lowtide.fitting.budgets import Asked, parse_budgets
from lowtide.fitting.meta_subject import MetaSubject
from lowtide.fitting.prepare import prepare
from lowtide.fitting.run_report import RunReport
from lowtide.fitting.subject import Size, Subject
from lowtide.memory.presets import execution_device
from lowtide.planning.plan import Plan, check_allowed
from lowtide.weights.fill import dtype_name


def fit(
    pipe: Subject,
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
    "-1GB" for what is free less 1 GB; None is "auto". `allow` names what may change the result: "fp8", "int8", "int4",
    "blended_tiling"; without it every plan gives the plain run's result, bit for bit, or up to rounding where pictures
    are decoded row by row or one by one. `size` says what will be asked for (`height`, `width`, `pictures`, `steps`,
    `frames`); calls of another size are planned anew before they begin. Budgets may be changed between calls by calling
    this again; `pipe.unfit()` undoes it.
    Raises `BudgetError`, naming the minimum, where no plan fits, `ValueError` for what is not possible, and
    `RuntimeError` inside a call; the pipeline is as it was then.
    """
    chosen = execution_device(device)
    check_allowed(allow)
    budgets = parse_budgets(chosen, vram, ram, disk)
    with pipe.call_lock.between_calls("its budget"):
        if pipe.applied is None:
            check_not_cast(pipe.modules())
        wanted = pipe.usual_size(**size)
        prepared = prepare(_meta(pipe, chosen), budgets, wanted, allow=tuple(allow), loaded=pipe.modules())
        plan = prepared.choose()
        put_under_plan(pipe, prepared, plan)
        return plan


def apply_plan(pipe: Subject, plan: Plan, device: torch.device | str | None = None) -> None:
    """Put a plan to work, such as one saved as JSON; calls of another size than its own are planned anew.

    Raises `ValueError` for a plan of components that this pipeline has not, or of another dtype.
    """
    unknown = sorted(set(plan.components) - set(pipe.modules()))
    if unknown:
        raise ValueError(f"The plan has {unknown}, and this pipeline has {', '.join(pipe.modules())}.")
    check_allowed(plan.allow)
    with pipe.call_lock.between_calls("its plan"):
        if pipe.applied is None:
            check_not_cast(pipe.modules())
        size = pipe.usual_size(**plan.made_for)
        chosen = execution_device(device or plan.device.partition(":")[0])
        dtype = dtype_name(pipe.dtype)
        if plan.dtype != dtype:
            raise ValueError(f"The plan is for {plan.dtype}, and this pipeline computes in {dtype}: make another one.")
        meta = _meta(pipe, chosen)
        put_under_plan(pipe, prepare(meta, plan.budgets, size, allow=plan.allow, loaded=pipe.modules()), plan)


def before_call(pipe: Subject, size: Size) -> None:
    """Have the plan that a call of this size needs at work; raises `BudgetError` where there is none."""
    applied = pipe.applied
    if applied is None:
        return
    fit, plan = applied.fit, applied.plan
    meta = _meta(pipe, fit.device)
    if meta is not fit.meta or size != fit.size:
        fit = prepare(meta, fit.budgets, size, allow=fit.allow, rates=fit.rates)
        plan = fit.choose_within(applied.lowered)
    applied.put_to_work(fit, plan)


def unfit(pipe: Subject) -> None:
    """Undo `fit`: no plan, no budget; every weight is where it was before, under the offload that was set then.

    Raises `RuntimeError` inside a call.
    """
    with pipe.call_lock.between_calls("its budget"):
        if pipe.applied is not None:
            pipe.applied.undo()
            pipe.applied = None


def report(pipe: Subject) -> RunReport:
    """What the last call took beside what its plan said, stage by stage.

    Raises `RuntimeError` where no budget was given, or nothing has run since.
    """
    applied = pipe.applied  # once: another thread may undo it now
    if applied is None:
        raise RuntimeError("There is nothing to report, since no budget was given: call pipe.fit(...) first.")
    return applied.report()


def _meta(pipe: Subject, device: torch.device) -> MetaSubject:
    """The subject on meta, made anew where a network was replaced, or is set otherwise, since."""
    applied = pipe.applied
    if applied is not None and applied.fit.device == device and applied.fit.meta.is_of(pipe):
        return applied.fit.meta
    return pipe.on_meta(device)


def check_not_cast(modules: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` for networks that rest in 8 or 4 bits by hand."""
    cast = [name for name, module in modules.items() if is_cast(module)]
    if cast:
        raise ValueError(
            f"{', '.join(cast)} rest in 4 or 8 bits already. Call disable_layerwise_casting on them first, and let the "
            "plan choose: fit(..., allow=('fp8',)) or ('int8',)."
        )
