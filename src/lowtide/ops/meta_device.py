"""The device that tensors on meta stand for, while the memory of a run is predicted.

Code that takes another way on a CPU than elsewhere asks `device_type(x)`, so that predictions take the same way.
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
    token = _MEANT.set(device)
    try:
        yield
    finally:
        _MEANT.reset(token)


def meant_device() -> str | None:
    """The type of device that tensors on meta stand for, if they do."""
    return _MEANT.get()


def meant_type(device: torch.device) -> str:
    """The type of a device, or of the one that it stands for."""
    return (_MEANT.get() or device.type) if device.type == "meta" else device.type


def device_type(x: torch.Tensor) -> str:
    """The type of device that a tensor is on, or stands for."""
    return meant_type(x.device)


def note_stored(nbytes: int) -> None:
    """Say that a run would have so many bytes in a temporary file at once."""
    _STORED.set(max(_STORED.get(), nbytes))


def taken_note() -> int:
    """The most bytes that were said to be stored since this was asked last."""
    stored = _STORED.get()
    _STORED.set(0)
    return stored
