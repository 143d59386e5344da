"""A copy of a module on meta: what can be traced without a byte of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lowtide.memory.placeholder import AtRest
from lowtide.memory.rule_changes import attachment_of, undisturbed
from lowtide.memory.store import DiskRest
from lowtide.memory.weight import Weight
from lowtide.weights.files import InFile
from lowtide.weights.provenance import in_file
from lowtide.weights.slots import Slot, slots


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy whose tensors are on meta, with the shapes, strides and dtypes that the module computes with.

    The module's own weights are neither read nor moved, and a rule that is at work on it is not copied; another thread
    that calls it under a rule is waited for, since weights come and go then. Raises `ValueError` for a module that
    cannot be copied, such as a traced one.
    """
    on_meta: dict[int, Any] = {}
    try:
        with undisturbed(module):
            for slot in slots(module):
                if id(slot.tensor) not in on_meta:
                    on_meta[id(slot.tensor)] = _on_meta(slot)
            on_meta |= {id(tensor): _empty(tensor) for tensor in _computed(module)}
            return copy.deepcopy(module, on_meta)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(module).__name__} cannot be planned for, since it cannot be copied: {error}"
        ) from error


def _on_meta(slot: Slot) -> torch.Tensor:
    empty = _empty(slot.tensor)
    return nn.Parameter(empty, slot.tensor.requires_grad) if slot.kind == "parameter" else empty


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _computed(module: nn.Module) -> Iterator[torch.Tensor]:
    """What modules keep of a computation with weights, which cannot be copied: `torch.nn.utils.weight_norm` does so."""
    for part in module.modules():
        yield from (kept for kept in vars(part).values() if isinstance(kept, torch.Tensor) and not kept.is_leaf)


def weights_in_files(module: nn.Module) -> dict[str, InFile]:
    """How each weight that came from a checkpoint lies there, by name; the others are in no file."""
    with undisturbed(module):
        attachment = attachment_of(module)
        views = [] if attachment is None else [(weight, view) for weight in attachment.weights for view in weight.views]
        moved = {(id(view.slot.owner), view.slot.leaf): weight for weight, view in views}
        entries = {slot.name: _in_file(slot, moved.get((id(slot.owner), slot.leaf))) for slot in slots(module)}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _in_file(slot: Slot, moved: Weight | None) -> InFile | None:
    """Where a weight of a rule comes from; a part of the module may be under a rule of its own."""
    weight = slot.tensor.weight if isinstance(slot.tensor, AtRest) else moved
    if weight is None:
        return in_file(slot.tensor)
    return weight.rest.lying if isinstance(weight.rest, DiskRest) else None
