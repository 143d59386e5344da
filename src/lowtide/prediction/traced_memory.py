"""Count the memory of tensors on meta, as the allocator of the device that is meant would have it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from lowtide.machine.segments import KINDS
from lowtide.prediction.caching_allocator import FREED, GRAIN, Event


def grain(device: str) -> int:
    """Bytes that the allocator of a kind of device rounds up to; on a CPU it is asked for exactly what is needed."""
    return 1 if device == "cpu" else GRAIN


@dataclass
class Memory:
    """Bytes alive, and the most there were. `grain` is what the allocator rounds up to.

    For a caching allocator there are `events`: what is allocated and freed, in order, and the `sizes` of what is alive.
    """

    grain: int
    alive: int = 0
    peak: int = 0
    workspace: int = 0
    refs: dict[int, Any] = field(default_factory=dict)
    events: list[Event] | None = None
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str) -> Memory:
        """That of a kind of device."""
        return cls(grain(device), events=[] if device in KINDS else None)

    def taken(self, nbytes: int) -> int:
        """What the allocator takes for so many bytes."""
        return -(-nbytes // self.grain) * self.grain

    def add(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor until it is gone, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.refs:
            return
        nbytes = self.taken(storage.nbytes())
        memory = self._allocated(nbytes)
        self.refs[key] = weakref.ref(storage, lambda _: self._gone(key, nbytes, memory))
        self.alive += nbytes

    def _gone(self, key: int, nbytes: int, memory: int) -> None:
        del self.refs[key]
        self.alive -= nbytes
        self._freed(memory)

    def _allocated(self, nbytes: int) -> int:
        if self.events is None:
            return 0
        memory = len(self.events)
        self.events.append((memory, nbytes))
        self.sizes[memory] = nbytes
        return memory

    def _freed(self, memory: int) -> None:
        if self.events is not None:
            self.events.append((memory, FREED))
            del self.sizes[memory]

    def worked(self, beside: int) -> None:
        """A kernel took so many bytes beside its inputs and outputs."""
        self.reached(0, beside)
        if beside:
            self._freed(self._allocated(beside))

    def reached(self, more: int, beside: int = 0) -> None:
        """So many more bytes are alive for now, and a kernel takes some beside them."""
        if self.alive + more + beside > self.peak:
            self.peak, self.workspace = self.alive + more + beside, beside
