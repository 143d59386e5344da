"""The device that tensors on meta stand for, while the memory of a run is predicted.

Code that does something else on a CPU than elsewhere asks `device_type(x)`, so that a prediction does the same.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_MEANT: ContextVar[str | None] = ContextVar("lowtide_meant_device", default=None)
_STORED: ContextVar[int] = ContextVar("lowtide_meant_stored", default=0)


@contextmanager
def standing_for(device: str | None) -> Generator[None]:
    """While this lasts, tensors on meta stand for tensors on a device of this type; with None, for nothing."""
    before = _MEANT.get()
    try:
        _MEANT.set(device)
        yield
    finally:
        _MEANT.set(before)


def meant_device() -> str | None:
    """The type of device that tensors on meta stand for, or None."""
    return _MEANT.get()


def meant_type(device: torch.device) -> str:
    """The type of a device; of the meta device, the type that it stands for."""
    return (_MEANT.get() or device.type) if device.type == "meta" else device.type


def device_type(x: torch.Tensor) -> str:
    """The type of the device that a tensor is on; of a tensor on meta, the type that it stands for."""
    return meant_type(x.device)


def note_stored(nbytes: int) -> None:
    """Note that a run would have `nbytes` bytes in a temporary file at once."""
    _STORED.set(max(_STORED.get(), nbytes))


def taken_note() -> int:
    """The most bytes that `note_stored` noted since the last call of this function."""
    stored = _STORED.get()
    _STORED.set(0)
    return stored
