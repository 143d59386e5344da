"""Copy results out of memory that is about to be used again, such as the buffer of a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from lowtide.memory.module_weights import PLAIN
from lowtide.memory.unit import Unit


def out_of_buffers(result: Any, units: Iterable[Unit]) -> Any:
    """`result`, copied where it lies in a buffer that one of `units` is about to leave."""
    for unit in units:
        if unit.load is not None and unit.load.buffer is not None and not unit.stays:
            result = copied_out(result, unit.load.buffer.flat)
    return result


def copied_out(result: Any, lent: torch.Tensor) -> Any:
    """`result`, with copies of its tensors that are views of the memory of `lent`; the object itself if none is.

    Looks into tuples, lists, dicts and dataclasses.
    """
    address = lent.untyped_storage().data_ptr()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        is_plain = type(tensor) in PLAIN and tensor.layout == torch.strided and tensor.device == lent.device
        return tensor.clone() if is_plain and tensor.untyped_storage().data_ptr() == address else tensor

    return _mapped(result, own)


def _mapped(value: Any, own: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `own` applied to the tensors inside; containers are copied only where one of them changes."""
    if isinstance(value, torch.Tensor):
        return own(value)
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, own) for item in value]
        if all(item is before for item, before in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return _with_changes(value, value, own, lambda changed, key, item: changed.__setitem__(key, item))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return _with_changes(value, parts, own, object.__setattr__)
    return value


def _with_changes(
    value: Any, parts: dict[Any, Any], own: Callable[[torch.Tensor], torch.Tensor], put: Callable[[Any, Any, Any], None]
) -> Any:
    items = {key: _mapped(part, own) for key, part in parts.items()}
    changes = {key: item for key, item in items.items() if item is not parts[key]}
    changed = copy.copy(value) if changes else value
    for key, item in changes.items():
        put(changed, key, item)
    return changed
