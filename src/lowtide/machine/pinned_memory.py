"""Pinned memory: host memory that a device copies at full speed, within one limit for all of this process.

What is pinned cannot be swapped, or be given to others: a machine of which too much is pinned comes to a halt.
"""

from __future__ import annotations

import atexit
from typing import Any

import torch

from lowtide.forks import new_lock, tell_of_forks
from lowtide.machine.accelerators import Accelerator, accelerator
from lowtide.machine.host import host_memory

SHARE = 0.5
"""Of the host's memory, or of what a container may have of it: what is pinned at most."""


def most_pinned(device: torch.device | str) -> int:
    """Bytes of weights that may be pinned for a device: half of the host's memory, or 0 where nothing can be."""
    kind = accelerator(device)
    return PINNED.limit if kind is not None and kind.registers else 0


class HostBuffer:
    """`nbytes` of host memory for copies to a device: `flat`, uint8, pinned where that may be and can be.

    `used` is an event behind the last copy from it, which is waited for before its memory is freed, pinned or not: not
    every device has read all of it when the call returns. A buffer is unpinned with its owner, before its memory is
    freed: tensors that view it may live on. A buffer of a stream `is_stage`.
    """

    used: Any = None

    def __init__(
        self, nbytes: int, device: torch.device, kind: Accelerator, *, may_pin: bool = True, is_stage: bool = False
    ) -> None:
        self.flat = torch.empty(nbytes, dtype=torch.uint8)
        self._device, self._kind = device, kind
        self._era = PINNED.era
        if may_pin and nbytes and PINNED.reserve(self):
            lent = kind.pinned_stage(nbytes) if is_stage else None
            if lent is not None:
                self.flat = lent
            elif not kind.pin(self.flat, device):
                PINNED.give(self)

    @property
    def is_pinned(self) -> bool:
        """Whether it is pinned now."""
        return PINNED.has(self)

    def unpin(self) -> None:
        """Wait for the last copy, and have ordinary memory again. May be called again, also after an interrupt."""
        if self.used is not None and self._era is PINNED.era:
            self.used.synchronize()
        if self.is_pinned:
            self._kind.unpin(self.flat, self._device)
            PINNED.give(self)

    def __del__(self) -> None:
        self.unpin()


class _Books:
    """What is pinned, by the `id` of its buffer: for all rules, pipelines, devices and threads."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._pinned: dict[int, int] = {}
        self.era = object()
        """Another in a forked child, and at the end of the process: what was copied before is waited for no more."""
        tell_of_forks(self)
        atexit.register(self.after_fork)

    @property
    def limit(self) -> int:
        """Bytes that may be pinned."""
        return int(host_memory().total * SHARE)

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned."""
        return sum(list(self._pinned.values()))

    def reserve(self, buffer: HostBuffer) -> bool:
        """Count a buffer that is about to be pinned, if there is room for it."""
        with self._lock:
            has_room = self.nbytes + buffer.flat.numel() <= self.limit
            if has_room:
                self._pinned[id(buffer)] = buffer.flat.numel()
            return has_room

    def give(self, buffer: HostBuffer) -> None:
        """Count it no more."""
        self._pinned.pop(id(buffer), None)

    def has(self, buffer: HostBuffer) -> bool:
        """Whether it is counted."""
        return id(buffer) in self._pinned

    def after_fork(self) -> None:
        """Count nothing: what the parent pinned is not pinned for a child, and not the child's to unpin or wait for.

        Nor is anything unpinned at the end of the process: the system does that.
        """
        self.era = object()
        self._pinned.clear()


PINNED = _Books()
"""Those of this process."""
