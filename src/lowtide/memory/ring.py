"""The device buffers that units are copied into: a ring of equal buffers used over and over, and single ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lowtide.memory.bounds import Sizes, depth, largest
from lowtide.memory.ledger import Ledger
from lowtide.memory.unit import Buffer, Unit
from lowtide.ops.modes import outside_inference_mode


class Ring:
    """Makes flat buffers on `device` and counts them in `ledger`; `nbytes` is the size of those of the ring.

    Of units that take a place in it, `depth` may be loaded at once: `prefetch` of them ahead.
    """

    def __init__(self, device: torch.device, ledger: Ledger, prefetch: int) -> None:
        self.device = device
        self.ledger = ledger
        self.prefetch = prefetch
        self.depth = depth(prefetch, several=False)
        self.nbytes = 0
        self.buffers: list[Buffer] = []

    # ---- for which units

    @property
    def looks_ahead(self) -> bool:
        """Whether units are loaded ahead."""
        return self.prefetch > 0

    def fits(self, streamed: Mapping[Unit, Sizes]) -> bool:
        """Whether its buffers are right for these units."""
        return largest(streamed.values()).copied == self.nbytes

    def fit(self, streamed: Mapping[Unit, Sizes]) -> None:
        """Have buffers for these units from now on; if the present ones do not fit them, those are gone."""
        self.depth = depth(self.prefetch, several=several(streamed))
        self.nbytes = largest(streamed.values()).copied

    def most(self, streamed: Mapping[Unit, Sizes]) -> Sizes:
        """Bytes that units of these sizes never exceed, together."""
        return largest(streamed.values()).times(self.depth)

    def has_room(self, unit: Unit, placed: Collection[Unit]) -> bool:
        """Whether `unit` finds a place beside those that have one."""
        return len(placed) < self.depth

    def ahead(self, upcoming: list[Unit], placed: Collection[Unit]) -> list[Unit]:
        """Which of the units to come are to be loaded ahead."""
        return upcoming

    # ---- buffers

    def free(self, unit: Unit, nbytes: int, used: set[int]) -> Buffer | None:
        """A buffer for so many bytes of `unit` whose `id` is not in `used`; None where the ring has none left."""
        if nbytes > self.nbytes:
            return None
        for buffer in self.buffers:
            if id(buffer) not in used:
                return buffer
        if len(self.buffers) >= self.depth:
            return None
        self.buffers.append(self.new(self.nbytes, in_ring=True))
        return self.buffers[-1]

    def freed(self, unit: Unit, buffer: Buffer) -> Any:
        """The event behind the last use of its memory; None for new memory."""
        return buffer.free

    def left(self, buffer: Buffer, event: Any) -> None:
        """Note the event behind its last use."""
        buffer.free = event

    def new(self, nbytes: int, *, in_ring: bool = False) -> Buffer:
        """A buffer of this size."""
        with outside_inference_mode():
            flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.ledger.take(nbytes)
        return Buffer(flat, in_ring)

    @property
    def held(self) -> int:
        """Bytes of the ring's buffers."""
        return sum(buffer.flat.numel() for buffer in self.buffers)

    def away(self, used: set[int]) -> None:
        """Let go of the buffers whose `id` is not in `used`."""
        for buffer in [buffer for buffer in self.buffers if id(buffer) not in used]:
            self.buffers.remove(buffer)
            self.ledger.give(buffer.flat.numel())


def several(streamed: Collection[Unit]) -> bool:
    """Whether a unit of several modules is among these, which stays loaded between their calls."""
    return any(len(unit.modules) > 1 for unit in streamed)
