"""Memory in which weights are dequantized while they work: for each device one buffer, as large as the largest leaf."""

from __future__ import annotations

import threading

import torch

from lowtide.ops.modes import outside_inference_mode


class Scratch(threading.local):
    """Flat buffers, lent and given back. Who takes one while another is lent gets one of their own.

    Each thread keeps its own, so that a run neither waits for another, nor takes its memory or keeps it alive.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, torch.Tensor] = {}

    def take(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """A flat uint8 tensor of `nbytes` or more."""
        kept = self._free.pop(device, None)
        if kept is not None and kept.numel() >= nbytes:
            return kept
        del kept  # before the larger one is made
        with outside_inference_mode():
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def give(self, flat: torch.Tensor) -> None:
        """Give a buffer back; the largest is kept."""
        kept = self._free.get(flat.device)
        if kept is None or kept.numel() < flat.numel():
            self._free[flat.device] = flat

    def release(self) -> None:
        """Keep nothing in this thread."""
        self._free.clear()


SCRATCH = Scratch()
"""The one of this process."""
