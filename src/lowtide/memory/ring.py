"""The device buffers that units are copied into: a ring of equal buffers used over and over, and single ones."""

from __future__ import annotations

import torch

from lowtide.memory.ledger import Ledger
from lowtide.memory.unit import Buffer
from lowtide.ops.modes import outside_inference_mode


class Ring:
    """Makes flat buffers on `device` and counts them in `ledger`; `nbytes` is the size of those of the ring."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        self.device = device
        self.ledger = ledger
        self.nbytes = 0
        self.buffers: list[Buffer] = []

    def free(self, used: set[int], most: int) -> Buffer | None:
        """A buffer of the ring whose `id` is not in `used`, made if there are fewer than `most`; else None."""
        for buffer in self.buffers:
            if id(buffer) not in used:
                return buffer
        if len(self.buffers) >= most:
            return None
        self.buffers.append(self.new(self.nbytes, in_ring=True))
        return self.buffers[-1]

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
