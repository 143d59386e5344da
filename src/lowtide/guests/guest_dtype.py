"""In which dtype a guest computes where none is asked for: the fastest here that is right for it.

On a CPU alone; elsewhere, and where it is as fast, each network computes in the dtype of its files. Weights rest as the
files have them whichever it is, and are converted as they come to work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.guests.unloaded import Part
from lowtide.machine.dtype_speeds import DTYPES
from lowtide.planning.computing_dtype import ON_CPU, Kind, first_that_fits, ranked
from lowtide.planning.plan import Budgets
from lowtide.weights.fill import dtype_name
from lowtide.weights.slots import slots

Choice = torch.dtype | None
"""A dtype to compute in; None is that of the files, each network's own."""


def kind_of_guest(checkpoint: GuestCheckpoint) -> Kind:
    """What a guest mostly computes: convolutions where there is a U-Net."""
    classes = (spec.class_name for spec in checkpoint.specs.values() if spec is not None)
    return Kind.CONVOLUTIONS if any("UNet" in name for name in classes) else Kind.PRODUCTS


def guest_dtypes(checkpoint: GuestCheckpoint, parts: Mapping[str, Part], device: torch.device) -> tuple[Choice, ...]:
    """The dtypes that are right for a guest on a device, the fastest first; `parts` are in the dtypes of the files.

    That of the files is, and so are float32 and bfloat16, unless networks were given, which have theirs, or some can
    only be loaded by their library.
    """
    own = _most(parts)
    given = any(isinstance(value, nn.Module) for value in checkpoint.given.values())
    by_library = any(part.reason for part in parts.values())
    if device.type != "cpu" or own is None or given or by_library or checkpoint.dtype is not None:
        return (checkpoint.dtype,)
    names = tuple(dict.fromkeys((dtype_name(own), *ON_CPU)))
    if not set(names) <= set(DTYPES):
        return (None,)
    named = {name: getattr(torch, name) for name in names} | {dtype_name(own): None}
    return tuple(named[name] for name in ranked(kind_of_guest(checkpoint), names))


def in_dtype(checkpoint: GuestCheckpoint, parts: Mapping[str, Part], dtype: Choice) -> GuestCheckpoint:
    """The checkpoint computing in a dtype, with those of its `parts` that are no networks as they were built."""
    if dtype == checkpoint.dtype:
        return checkpoint
    built = {name: part.built for name, part in parts.items() if not isinstance(part.built, nn.Module)}
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in built}
    return replace(checkpoint, dtype=dtype, specs=specs, given={**checkpoint.given, **built})


def load_in_fastest(
    checkpoint: GuestCheckpoint, budgets: Budgets, allow: tuple[str, ...], device: torch.device
) -> tuple[Choice, tuple[Choice, ...], Any]:
    """The pipeline in the fastest dtype in which it fits the budgets, and before it that one and all that could be."""
    parts = checkpoint.parts()
    dtypes = guest_dtypes(checkpoint, parts, device)
    chosen, pipe = first_that_fits(dtypes, lambda dtype: load_in(checkpoint, parts, dtype, budgets, allow, device))
    return chosen, dtypes, pipe


def load_in(
    checkpoint: GuestCheckpoint,
    parts: Mapping[str, Part],
    dtype: Choice,
    budgets: Budgets,
    allow: tuple[str, ...],
    device: torch.device,
) -> Any:
    """The pipeline in a dtype, within the budgets; `parts` are the checkpoint's."""
    chosen = in_dtype(checkpoint, parts, dtype)
    return chosen.load(budgets, allow, device, parts if chosen is checkpoint else None)


def _most(parts: Mapping[str, Part]) -> torch.dtype | None:
    """The dtype of most of the weights."""
    sizes: dict[torch.dtype, int] = {}
    for part in parts.values():
        if isinstance(part.built, nn.Module):
            for slot in slots(part.built):
                if slot.tensor.is_floating_point():
                    sizes[slot.tensor.dtype] = sizes.get(slot.tensor.dtype, 0) + slot.tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)
