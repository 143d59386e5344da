"""The places in a module where tensors sit: the only door between a module and its weights."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lowtide.calls import Call
from lowtide.forks import tell_of_forks


@dataclass(frozen=True, eq=False)
class Slot:
    """One place of a tensor in a module. Transient: a buffer that checkpoints do not hold."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: torch.Tensor
    kind: Literal["parameter", "buffer", "transient"]

    def put(self, tensor: torch.Tensor | None) -> None:
        """Let `tensor`, if there is one, be what the module computes with; a parameter's slot takes a parameter."""
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


class _Emptied(Call):
    """Places where nothing is for a while, with what was there."""

    def __init__(self, places: Iterable[Slot]) -> None:
        super().__init__()
        self._held = [(slot, slot.now()) for slot in places]
        tell_of_forks(self)

    def empty(self) -> None:
        for slot, _ in self._held:
            slot.table[slot.leaf] = None

    def put_back(self) -> None:
        for slot, tensor in self._held:
            slot.put(tensor)

    def after_fork(self) -> None:
        """In a forked child, the thread that would put them back may not go on."""
        if self.thread != threading.get_ident():
            self.put_back()


@contextmanager
def emptied(places: Iterable[Slot]) -> Generator[None]:
    """While this lasts, nothing is in these places; afterwards what was there is there again."""
    this = _Emptied(places)
    try:
        this.empty()
        yield
    finally:
        try:
            this.put_back()
        except BaseException:
            this.put_back()  # an interrupt came into it, and nobody else has them
            raise


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
