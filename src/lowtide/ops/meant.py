"""The device that tensors on meta stand for, while the memory of a run is predicted.

Code that takes another way on a CPU than elsewhere asks `device_type(x)`, so that predictions take the same way.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_MEANT: ContextVar[str | None] = ContextVar("lowtide_meant_device", default=None)


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


def device_type(x: torch.Tensor) -> str:
    """The type of device that a tensor is on, or stands for."""
    kind = x.device.type
    return (_MEANT.get() or kind) if kind == "meta" else kind
