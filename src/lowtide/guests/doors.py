"""Budgets for any pipeline, of ours or of other libraries: fit, look at the plan, undo."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from lowtide.fitting import fit as fitting
from lowtide.fitting.budgets import Asked
from lowtide.fitting.run_report import RunReport
from lowtide.fitting.subject import Subject
from lowtide.guests.guest import Guest
from lowtide.guests.networks import is_pipeline
from lowtide.guests.within_budget import guest_begun, guest_of, guest_to_be, put_within, take_out
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.planning.plan import Plan


def fit(
    pipe: Any,
    vram: Asked = None,
    ram: Asked = None,
    *,
    disk: Asked = None,
    allow: Collection[str] = (),
    device: torch.device | str | None = None,
    **call: Any,
) -> Plan:
    """Have any pipeline keep within budgets of bytes, as fast as they allow, and return the plan.

    The pipeline is ours, or one of `diffusers`, or any object with `components` by name and a call. See
    `lowtide.fitting.fit.fit` for budgets and `allow`. `call` are arguments of the call that is planned for, by their
    own names, such as `height`; calls of another size are planned anew before they begin. `unfit` undoes it.
    Raises `BudgetError`, naming the minimum, where no plan fits, `TypeError` for what is no pipeline and for arguments
    that its call does not take, and `ValueError` for what is not possible.
    """
    subject = _subject(pipe) or guest_to_be(pipe)
    with subject.call_lock.between_calls("its budget"):
        plan = fitting.fit(subject, vram, ram, disk=disk, allow=allow, device=device, **call)
        if isinstance(subject, Guest):
            put_within(subject)
    return plan


def apply_plan(pipe: Any, plan: Plan, device: torch.device | str | None = None) -> None:
    """Put a plan to work on any pipeline, such as one saved as JSON; see `lowtide.fitting.fit.apply_plan`."""
    subject = _subject(pipe) or guest_to_be(pipe)
    with subject.call_lock.between_calls("its plan"):
        fitting.apply_plan(subject, plan, device)
        if isinstance(subject, Guest):
            put_within(subject)


def plan_of(pipe: Any) -> Plan | None:
    """The plan at work on a pipeline, for the call that was made last; None where no budget was given."""
    subject = _subject(pipe)
    applied = None if subject is None else subject.applied  # once: another thread may undo it now
    return None if applied is None else applied.plan


def report(pipe: Any) -> RunReport:
    """What a pipeline's last call took beside what its plan said; see `lowtide.fitting.fit.report`."""
    subject = _subject(pipe)
    if subject is None:
        raise RuntimeError("There is nothing to report, since no budget was given: call lowtide.fit(pipe, ...) first.")
    return fitting.report(subject)


def unfit(pipe: Any) -> None:
    """Undo `fit`: no plan, no budget; every weight is where it was before.

    Raises `RuntimeError` inside a call.
    """
    subject = _subject(pipe) or guest_begun(pipe)
    if subject is None:
        return
    with subject.call_lock.between_calls("its budget"):
        fitting.unfit(subject)
        if isinstance(subject, Guest):
            take_out(subject)


def _subject(pipe: Any) -> Subject | None:
    """What stands for a pipeline: ours itself, the guest of another that is within a budget; else None.

    Raises `TypeError` for what is no pipeline.
    """
    if isinstance(pipe, DiffusionPipeline):
        return pipe
    if not is_pipeline(pipe):
        raise TypeError(
            f"A {type(pipe).__name__} is no pipeline: give an object that has `components`, its networks among them by "
            "name, and that can be called. A single network is given a rule with lowtide.apply_residency."
        )
    return guest_of(pipe)
