"""Masks of attention that a network makes itself, a part at a time: never the table of all queries and keys.

A mask of a clip says which frames a frame may attend to, so it has a number for every pair of pixels of the clip: at
published sizes more bytes than the machine has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowtide.activations.graph import Made, Span, Value, Written

ENTRYWISE = frozenset("le lt ge gt eq ne and or where logical_and logical_or logical_not to type float mul add".split())  # noqa: SIM905
REPEATED = frozenset("unsqueeze expand repeat repeat_interleave view reshape contiguous".split())  # noqa: SIM905
"""Functions that repeat one table for every picture and head."""


FILLED = frozenset(("zeros", "ones", "full"))
"""Functions that make a table of one number, into which others may be written."""


def is_table(mask: Value) -> bool:
    """Whether a mask is made of numbers of the queries and numbers of the keys, so that parts of it can be made."""
    step = mask.step
    if isinstance(step, Written):
        rows = {row for row, *_ in step.writes}
        return len(mask.shape) == 2 and step.name in FILLED and len(rows) == len(step.writes) == mask.shape[0]
    if not isinstance(step, Made):
        return False
    if step.name == "meshgrid":
        return len(mask.shape) == 2
    tables = [value for value in step.weights() if len(value.shape) > 0]
    if step.name in REPEATED:
        return len(tables) == 1 and mask.shape[-2:] == tables[0].shape[-2:] and is_table(tables[0])
    return (
        step.name in ENTRYWISE
        and bool(tables)
        and all(table.shape == mask.shape and is_table(table) for table in tables)
    )


def mask_part(
    mask: Value,
    queries: tuple[Value, Span],
    keys: tuple[Value, Span],
    constant: Callable[[Value], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """The part `[queries, keys]` of a mask for some rows of the queries and some rows of the keys."""
    places = tuple(_tokens(value, span, device) for value, span in (queries, keys))
    return _part(mask, places, constant, device)


def _part(
    mask: Value, places: tuple[torch.Tensor, ...], constant: Callable[[Value], torch.Tensor], device: torch.device
) -> torch.Tensor:
    step = mask.step
    assert isinstance(step, Made)
    if isinstance(step, Written):
        first, end, written = step.by_row.to(device)[places[0]].unsqueeze(1).unbind(-1)
        base = step.func(*_one_number(step), device=device, dtype=torch.float64)
        return torch.where((places[1] >= first) & (places[1] < end), written, base).to(mask.dtype)
    if step.name == "meshgrid":
        by_columns = (step.pick == 1) == (step.arguments[1].get("indexing") != "xy")
        numbers = constant(list(step.weights())[step.pick or 0])
        return numbers[places[1]][None] if by_columns else numbers[places[0]][:, None]

    def put(value: Value) -> Any:
        return _part(value, places, constant, device) if len(value.shape) > 0 else constant(value)

    if step.name in REPEATED:
        return put(next(step.weights()))
    return step.make(device, put)


def _one_number(step: Written) -> tuple[Any, ...]:
    """The arguments that make a table of one entry, in place of all."""
    args, kwargs = step.arguments
    return ((), *args[1:], *([kwargs["fill_value"]] if "fill_value" in kwargs else []))[
        : 2 if step.name == "full" else 1
    ]


def _tokens(value: Value, span: Span, device: torch.device) -> torch.Tensor:
    """The numbers of the tokens of some rows."""
    axis = value.axis
    assert axis is not None
    tokens = torch.arange(axis.size(axis.count), device=device).view(axis.planes, axis.count, axis.width)
    return tokens[:, span[0] : span[1]].flatten()
