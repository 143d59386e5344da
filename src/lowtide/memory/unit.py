"""A unit: weights that work together, with two verbs, enter and leave."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowtide.memory.blocks import Part
from lowtide.memory.placeholder import spoil
from lowtide.memory.store import DiskRest, Window
from lowtide.memory.weight import Weight

if TYPE_CHECKING:
    from lowtide.memory.stream import Stream


class Unit:
    """Weights that are loaded together, around the calls of some modules.

    Entering is counted, so calls may be nested; weights never change, so leaving only drops. `place` and `drop` may be
    called again after an exception anywhere.
    """

    def __init__(self, name: str, part: Part, stream: Stream) -> None:
        self.name = name
        self.modules = part.modules
        self.weights = list(part.weights)
        self.aside = part.aside
        self.stream = stream
        self.stays = False
        self.lingers = False
        self.count = 0
        self.load: Load | None = None
        self.host_flat: torch.Tensor | None = None
        self._placed: list[tuple[list[torch.Tensor], list[int]]] = []

    def enter(self) -> None:
        """Have the weights in their slots, loaded if they are not."""
        self.count += 1
        if self.load is None:
            replaced = [weight for weight in self.weights if weight.disown_replaced()]
            if replaced:
                self.stream.changed(self)
            self.stream.fetch(self)

    def leave(self, module: nn.Module, *, may_wait: bool) -> None:
        """One call of `module`, one of this unit's, has ended: drop the weights after the last.

        With `may_wait` they stay for the unit's other modules, or for another call of the whole.
        """
        self.count = max(0, self.count - 1)
        if self.count == 0 and not self.stays and not (may_wait and self._waits_for_more(module)):
            self.stream.drop(self)

    def _waits_for_more(self, module: nn.Module) -> bool:
        return self.lingers or (len(self.modules) > 1 and not self.aside and module is not self.modules[-1])

    def place(self, load: Load, tensors: list[list[torch.Tensor]]) -> None:
        """Put loaded tensors into the slots."""
        self._placed = [(group, [tensor._version for tensor in group]) for group in tensors]
        self.load = load  # from here on `lift` knows what to do
        for weight, group in zip(self.weights, tensors, strict=True):
            weight.put(group)

    def lift(self) -> None:
        """Put the placeholders back, and keep what the module itself has changed."""
        for weight, (group, versions) in zip(self.weights, self._placed, strict=True):
            if weight.is_changed(group, versions):
                self._keep_changes(weight, group)
            weight.lay_down()
        placed = self._placed
        self.load = None
        self._placed, self.count = [], 0
        spoil(tensor for group, _ in placed for tensor in group)  # counts as a write, so not before the end

    def _keep_changes(self, weight: Weight, group: list[torch.Tensor]) -> None:
        before: Any = weight.rest
        weight.adopt(group)
        if before is not weight.rest and isinstance(before, DiskRest) and before.works_in_place:
            Window([before]).let_go()
        self.host_flat = None
        self.stream.changed(self)


@dataclass(eq=False)
class Buffer:
    """One flat buffer of the ring, or of a unit that stands aside; `free` is an event of the device, if it has such."""

    flat: torch.Tensor
    in_ring: bool
    free: Any = None
    views: dict[int, list[list[torch.Tensor]]] = field(default_factory=dict)


@dataclass(eq=False)
class Load:
    """A unit's weights on their way to the device, or there."""

    unit: Unit
    buffer: Buffer | None
    window_bytes: int
    future: Future[None] | None = None
    event: Any = None
