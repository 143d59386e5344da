"""The places in a module where tensors sit: the only door between a module and its weights."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Slot:
    """One place of a tensor in a module. Transient: a buffer that checkpoints do not hold."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: torch.Tensor
    kind: Literal["parameter", "buffer", "transient"]

    def put(self, tensor: torch.Tensor) -> None:
        """Let `tensor` be what the module computes with; a parameter's slot takes a parameter."""
        if self.kind == "parameter" and isinstance(self.owner, nn.RNNBase):
            setattr(self.owner, self.leaf, tensor)  # these keep a second list of their parameters
        else:
            self.table[self.leaf] = tensor

    def now(self) -> torch.Tensor | None:
        """What sits in the slot at this moment."""
        return self.table.get(self.leaf)

    @property
    def table(self) -> dict[str, Any]:
        """The table of the owner that the slot is in."""
        return self.owner._parameters if self.kind == "parameter" else self.owner._buffers


@contextmanager
def emptied(places: Iterable[Slot]) -> Generator[None]:
    """While this lasts, nothing is in these places; afterwards what was there is there again."""
    held = [(slot, slot.now()) for slot in places]
    try:
        for slot, _ in held:
            slot.table[slot.leaf] = None
        yield
    finally:
        try:
            _put_back(held)
        except BaseException:
            _put_back(held)  # an interrupt came into it, and nobody else has them
            raise


def _put_back(held: list[tuple[Slot, torch.Tensor | None]]) -> None:
    for slot, tensor in held:
        slot.table[slot.leaf] = tensor


def slots(module: nn.Module) -> Iterator[Slot]:
    """Every place of a tensor, shared modules and tied tensors under each of their names."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield Slot(dot + leaf, owner, leaf, parameter, "parameter")
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                is_transient = leaf in owner._non_persistent_buffers_set
                yield Slot(dot + leaf, owner, leaf, buffer, "transient" if is_transient else "buffer")
