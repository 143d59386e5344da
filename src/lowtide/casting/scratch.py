"""Memory in which weights are dequantized while they work: for each device one buffer, as large as the largest leaf."""

from __future__ import annotations

import threading
from typing import Any

import torch

from lowtide.ops.modes import outside_inference_mode


class Scratch(threading.local):
    """Flat buffers, lent and given back. Who takes one while another is lent gets one of their own.

    Each thread keeps its own, so that a run neither waits for another, nor takes its memory or keeps it alive. On an
    accelerator a buffer serves the stream that it was made on, and no other: what is asked for there comes in order,
    also where the allocator gives the memory away. Who computes on another stream gets a buffer that is made there.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, tuple[torch.Tensor, Any]] = {}

    def take(self, nbytes: int, device: torch.device, stream: Any = None) -> torch.Tensor:
        """A flat uint8 tensor of `nbytes` or more, for the `stream` of the device that computes now, if it has such."""
        kept = self._free.pop(device, None)
        if kept is not None and kept[0].numel() >= nbytes and kept[1] == stream:
            return kept[0]
        del kept  # before the larger one is made
        return flat_on(device, nbytes)

    def give(self, flat: torch.Tensor, stream: Any = None) -> None:
        """Give a buffer back, with the stream that it was taken for; the largest is kept.

        That stream must have waited for all others that used it.
        """
        kept = self._free.get(flat.device)
        if kept is None or kept[1] != stream or kept[0].numel() < flat.numel():
            self._free[flat.device] = flat, stream

    def release(self) -> None:
        """Keep nothing in this thread."""
        self._free.clear()


def flat_on(device: torch.device, nbytes: int) -> torch.Tensor:
    """A new flat uint8 tensor."""
    with outside_inference_mode():
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


SCRATCH = Scratch()
"""The one of this process."""
