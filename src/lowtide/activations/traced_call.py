"""One call of a function of PyTorch, as the trace of a network sees it and the rules read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowtide.activations.graph import RowAxis, Step, Value, filled, holds
from lowtide.activations.steps import regrouped

StepAndRows = tuple[Step, RowAxis]


class NotByRowsError(ValueError):
    """A network cannot be computed row by row; the message names what it does that prevents this."""


@dataclass(frozen=True)
class Call:
    """One call of a function: its arguments, values for tensors, and its result on meta (entry `pick` of a tuple)."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: torch.Tensor
    pick: int | None = None

    @property
    def name(self) -> str:
        """The function's name; the in-place form has the same name."""
        name = self.func.__name__
        return name.replace("__i", "__", 1) if name.startswith("__") else name.rstrip("_")

    @property
    def first(self) -> Value:
        """The first argument."""
        return self.args[0]

    @property
    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The arguments in the form in which a step keeps them."""
        return self.args, self.kwargs

    def named(self, *names: str) -> dict[str, Any]:
        """The arguments by the names in the function's signature, or by `names` for a function without one."""
        if names:
            return {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def rows_in(value: Value) -> RowAxis:
    """Where the rows of a value are that has rows."""
    assert value.axis is not None
    return value.axis


def with_same_rows(call: Call) -> tuple[Call, int]:
    """A call whose tensors have the same rows, the smallest of theirs, and the place of the rows from the right.

    Raises `NotByRowsError` for tensors that have different numbers of entries there.
    """
    values = {value: rows_in(value) for value in holds(call.arguments) if value.axis is not None}
    forms = {(len(value.shape) - axis.dim, axis.size(axis.count), axis.planes) for value, axis in values.items()}
    finest = max(values.values(), key=lambda axis: axis.count)
    unlike = any(finest.count % axis.count for axis in values.values())
    if len(forms) != 1 or unlike or (finest.planes > 1 and len({axis.count for axis in values.values()}) > 1):
        raise NotByRowsError(f"it combines tensors with different rows in {call.name}")
    ((from_right, _, _),) = forms
    alike = {value: regrouped(value, replace(finest, dim=axis.dim)) for value, axis in values.items()}
    args, kwargs = filled(call.arguments, lambda value: alike.get(value, value))
    return replace(call, args=args, kwargs=kwargs), from_right


def picking(func: Callable[..., Any], pick: int | None) -> Callable[..., Any]:
    """`func`, or entry `pick` of the tuple that it returns."""
    return func if pick is None else lambda *args, **kwargs: func(*args, **kwargs)[pick]
