"""`lowtide plan` for a pipeline of diffusers: what a call of it would take, from its configurations alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lowtide.cli.budget_options import Budget
from lowtide.cli.device_and_dtype import tell_chosen_by_guest, tell_if_slow
from lowtide.cli.errors import InputError, in_one_line, tell
from lowtide.cli.request import check_guidance, check_steps, parse_size
from lowtide.guests.asked import PROMPT, call_arguments, hint_for
from lowtide.guests.written_call import call_of

if TYPE_CHECKING:
    import torch

    from lowtide.planning.alternatives import Outlook

D = TypeVar("D")
_LACKING = (PROMPT, "--negative", "--seed", "--count")


@dataclass(frozen=True)
class GuestAsked:
    """The call to plan: a model, the class of its pipeline, a device ("cpu" or "cuda", which need not be here).

    `dtype` None is the fastest that is right, `config` where the configurations of a file are. `options` are values by
    option of `lowtide.guests.asked.NAMES`, `settings` by the call's own names.
    """

    model: str
    class_name: str
    device: str
    dtype: str | None
    variant: str | None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config: str | None = None


def guest_options(
    batch: int, steps: int | None, size: str | None, frames: int | None, guidance: float | None
) -> dict[str, Any]:
    """What was asked for, by option. Raises `InputError` for what no call can make."""
    for option, count in (("--batch", batch), ("--frames", frames)):
        if count is not None and count < 1:
            raise InputError(f"{option} {count}: at least one must be made.")
    if steps is not None:
        check_steps(steps)
    if guidance is not None:
        check_guidance(guidance)
    asked = {
        "--batch": batch if batch > 1 else None,
        "--steps": steps,
        "--size": None if size is None else parse_size(size, 1),
        "--frames": frames,
        "--guidance": guidance,
    }
    return {option: value for option, value in asked.items() if value is not None}


def look_at_guest(asked: GuestAsked, budget: Budget) -> Outlook:
    """Plan the call from the model's configurations alone."""
    call = call_of(asked.class_name)
    try:
        arguments = call_arguments(asked.class_name, call, asked.options, asked.settings, lacking=_LACKING)
    except ValueError as error:
        raise InputError(str(error)) from error
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from lowtide.fitting.budgets import parse_budgets
    from lowtide.guests.checkpoint import GuestCheckpoint
    from lowtide.guests.guest_dtype import guest_dtypes, in_dtype, kind_of_guest
    from lowtide.hub import Source
    from lowtide.planning.alternatives import look

    device = torch.device(asked.device)
    dtype = None if asked.dtype is None else getattr(torch, asked.dtype)
    with in_one_line(asked.class_name, hint_for(call, arguments)):
        checkpoint = GuestCheckpoint.opened(Source(asked.model), arguments, dtype, asked.variant, asked.config)
        if asked.dtype is not None:
            tell_if_slow(kind_of_guest(checkpoint), asked.dtype, device.type)
        budgets = parse_budgets(device, budget.vram, budget.ram, budget.disk)
        parts = checkpoint.parts(may_lack_weights=True)
        dtypes = guest_dtypes(checkpoint, parts, device)

        def attempt(chosen: torch.dtype | None) -> tuple[tuple[torch.dtype | None, str], Outlook]:
            own = in_dtype(checkpoint, parts, chosen)
            own_parts = parts if own is checkpoint else own.parts(may_lack_weights=True)
            fit = own.prepared(own_parts, budgets, budget.allow, device)
            return (chosen, fit.workload.dtype), look(fit.workload, fit.rates, fit.budgets, fit.allow)

        (chosen, planned_in), outlook = first_with_plan(map(attempt, dtypes))
    tell_chosen_by_guest(kind_of_guest(checkpoint), chosen, dtypes, device.type)
    absent = [name for name, part in parts.items() if not part.is_here]
    if absent and asked.dtype is None:
        tell(
            f"The weights of {', '.join(absent)} are not here, so they are planned in {planned_in}. Choose another "
            "dtype with --dtype."
        )
    return outlook


def first_with_plan(outlooks: Iterable[tuple[D, Outlook]]) -> tuple[D, Outlook]:
    """The first dtype in which a plan fits, and its outlook; where there is none, that which needs the least."""
    refused: list[tuple[D, Outlook]] = []
    for dtype, outlook in outlooks:
        if outlook.plan is not None:
            return dtype, outlook
        refused.append((dtype, outlook))
    return min(refused, key=lambda pair: (pair[1].minimum.vram or 0, pair[1].minimum.ram or 0))
