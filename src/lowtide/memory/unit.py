"""A unit: weights that work together, where they are now, and the memory they are loaded to. The stream drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowtide.machine.pinned_memory import HostBuffer
from lowtide.memory.blocks import Part
from lowtide.memory.placeholder import spoil
from lowtide.memory.reader import Reading
from lowtide.memory.weight import Weight


def read_by_rows(modules: Iterable[nn.Module]) -> bool:
    """Whether modules read some rows of their weights only: embeddings do."""
    return all(isinstance(module, nn.Embedding) for module in modules)


class Unit:
    """Weights that are loaded together, around the calls of some modules; see `Stream.enter` and `Stream.leave`.

    `count` is the number of calls that need it now. While its weights are in their slots, `load` is the load that
    brought them, and `placed` the tensors put there with their versions. A unit that `stays` is never dropped; a unit
    that `lingers` is not dropped after every call. Of a unit that is used `by_rows` only these are read, where all of
    it can work where it lies. Where all of it rests in one run of memory for copies to an accelerator, that is `host`.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.modules = part.modules
        self.weights = list(part.weights)
        self.aside = part.aside
        self.recurs = part.recurs
        self.by_rows = read_by_rows(part.modules)
        self.stays = False
        self.lingers = False
        self.count = 0
        self.load: Load | None = None
        self.host: HostBuffer | None = None
        self.placed: list[tuple[list[torch.Tensor], list[int]]] = []

    def waits_after(self, module: nn.Module) -> bool:
        """Whether its weights stay loaded after a call of `module`, for its other modules or another call."""
        return self.lingers or (len(self.modules) > 1 and not self.aside and module is not self.modules[-1])

    def place(self, load: Load, tensors: list[list[torch.Tensor]]) -> None:
        """Put loaded tensors into the slots."""
        self.placed = [(group, [tensor._version for tensor in group]) for group in tensors]
        self.load = load  # from here on `lift` knows what to do
        for weight, group in zip(self.weights, tensors, strict=True):
            weight.put(group)

    def lift(self, keep: Callable[[Unit, Weight, list[torch.Tensor]], None]) -> None:
        """Put the placeholders back, and have kept what the module has changed. Right also after an interrupt in it."""
        for weight, (group, versions) in zip(self.weights, self.placed, strict=True):
            if weight.is_changed(group, versions):
                keep(self, weight, group)
            weight.lay_down()
        placed = self.placed
        self.load = None
        self.placed, self.count = [], 0
        if torch.is_grad_enabled():  # counts as a write, so not before the end
            spoil(tensor for group, _ in placed for tensor in group)


@dataclass(eq=False)
class Buffer:
    """One flat buffer of the ring, or of a unit that stands aside.

    `free` is an event of the device, if it has such, behind its last use, and `turn` tells which came last of several.
    """

    flat: torch.Tensor
    in_ring: bool
    free: Any = None
    turn: int = 0
    views: dict[int, list[list[torch.Tensor]]] = field(default_factory=dict)


@dataclass(eq=False)
class Load:
    """A unit's weights on their way to the device, or there."""

    unit: Unit
    buffer: Buffer | None
    window_bytes: int
    reading: Reading | None = None
    event: Any = None

    @property
    def bytes_alone(self) -> int:
        """Bytes that it takes beside the buffers of the ring."""
        own = 0 if self.buffer is None or self.buffer.in_ring else self.buffer.flat.numel()
        return self.window_bytes + own
