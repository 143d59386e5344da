"""A unit: weights that work together, where they are now, and the memory they are loaded to. The stream drives it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from lowtide.memory.blocks import Part


class Unit:
    """Weights that are loaded together, around the calls of some modules; see `Stream.enter` and `Stream.leave`.

    `count` is the number of calls that need it now. While its weights are in their slots, `load` is the load that
    brought them, and `placed` the tensors put there with their versions. A unit that `stays` is never dropped; a unit
    that `lingers` is not dropped after every call.
    """

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.modules = part.modules
        self.weights = list(part.weights)
        self.aside = part.aside
        self.stays = False
        self.lingers = False
        self.count = 0
        self.load: Load | None = None
        self.host_flat: torch.Tensor | None = None
        self.placed: list[tuple[list[torch.Tensor], list[int]]] = []


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
