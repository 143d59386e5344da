"""How a slot sees the bytes of its weight, and what becomes of that when a module is converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lowtide.memory.store import DiskRest, is_reordered
from lowtide.weights.files import Origin
from lowtide.weights.slots import Slot


@dataclass(frozen=True, eq=False)
class View:
    """How one slot sees the bytes of its weight, from `offset` on."""

    slot: Slot
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for slots that hold one and the same tensor."""
        return self.offset, self.shape, self.stride, self.dtype, self.slot.kind == "parameter"

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor for the slot, on the bytes `flat`.

        It requires a gradient if the slot's did: some kernels sum in another order then, also where none is taken.
        """
        length = span(self.shape, self.stride) * self.dtype.itemsize
        with torch.inference_mode(mode=False):
            # .data: a version counter of its own, so that a write to one tensor is not taken for a write to another
            tensor = flat[self.offset : self.offset + length].view(self.dtype).as_strided(self.shape, self.stride).data
            return nn.Parameter(tensor, self.requires_grad) if self.slot.kind == "parameter" else tensor


def numbers_in_file(rest: DiskRest, view: View) -> Origin | None:
    """The numbers of a view as a file has them, in the order of files; None for spilled bytes in another order."""
    if rest.origin.dtype != torch.uint8 or view.dtype == torch.uint8:
        return rest.origin
    return None if is_reordered(view.shape, view.stride) else replace(rest.origin, dtype=view.dtype)


@dataclass(frozen=True)
class Became:
    """The dtype, device and strides that a tensor was given."""

    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]


def became(view: View, device: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> Became:
    """What `fn`, given to `Module._apply`, makes of a tensor like that of `view`: asked with a small one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(len(view.shape))
    shaped = torch.empty(view.shape, device="meta")
    probe = torch.zeros((2,) * len(view.shape), dtype=view.dtype, device=device)
    if last is not None:
        last_stride = shaped.to(memory_format=last).stride()
        is_last = view.stride == last_stride != shaped.stride()
        probe = probe.to(memory_format=last) if is_last else probe
        after = fn(probe)
        if after.is_contiguous(memory_format=last):
            return Became(after.dtype, after.device, last_stride)
    else:
        after = fn(probe)
    return Became(after.dtype, after.device, shaped.stride() if after.is_contiguous() else view.stride)


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
