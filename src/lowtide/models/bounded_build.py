"""Build networks on meta that are no larger than their weights: configurations may ask for millions of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowtide.configs import CheckpointError

MOST_TENSORS = 8192
"""The most tensors of a network without weights; published ones have up to 2,000."""
BESIDE = 64
"""Tensors beyond those of the weights that a network may make: buffers, and tied ones, which are made twice."""
COUNTING = ("layers", "block_out_channels")
"""Parts of the names of entries that decide how many tensors there are."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Counting(TorchFunctionMode):
    """Counts the tensors that are made in this thread, and raises `_TooManyError` beyond `most` of them.

    What would fill them is left out, since there is nothing to fill on meta.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.count = most, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        self.count += func in (torch.empty, torch.ones, torch.zeros)
        if self.count > self.most:
            raise _TooManyError
        return func(*args, **(kwargs or {}))


class _TooManyError(Exception):
    pass


def build_on_meta(
    build: Callable[[], ModuleT], file: Path, config: Mapping[str, Any], weights: Sized | None
) -> ModuleT:
    """What `build` makes on meta of the `config` in a file, with at most as many tensors as its `weights` allow.

    Raises `CheckpointError`, which names the file and the entries that ask for more.
    """
    most = MOST_TENSORS if weights is None else 2 * len(weights) + BESIDE
    try:
        with torch.device("meta"), _Counting(most):
            return build()
    except _TooManyError:
        said = ", ".join(f"{name}={value!r:.60}" for name, value in _counts(config))
        beside = "a network without weights may have" if weights is None else "its weights are"
        size = MOST_TENSORS if weights is None else len(weights)
        raise CheckpointError(
            f"{file}: it describes a network of too many tensors: {beside} {size}. Of its entries {said} decide that."
        ) from None


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries that decide how many tensors there are, also those of configurations inside."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif any(part in name for part in COUNTING) and _is_count(value):
            yield name, value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value))
