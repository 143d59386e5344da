"""Autocast on meta: code asks for it by the device of its tensors, and PyTorch refuses the meta device.

While anybody drives a call on meta, `torch.autocast` is a class derived from itself that takes the device which is
meant. For every other device, and so for other threads, it does the same as ever.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from lowtide.forks import new_lock
from lowtide.ops.meta_device import meant_device

_Plain = torch.autocast


class _Meant(_Plain):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        meant = meant_device()
        super().__init__(meant if device_type == "meta" and meant is not None else device_type, *args, **kwargs)


_lock = new_lock()
_drives = 0


@contextmanager
def autocast_on_meta() -> Generator[None]:
    """While this lasts, `torch.autocast("meta")` is that of the meant device, in threads where one is meant."""
    try:
        _count(1)
        yield
    finally:
        _count(-1)


def _count(more: int) -> None:
    global _drives  # noqa: PLW0603
    with _lock:
        _drives += more
        torch.autocast = _Meant if _drives > 0 else _Plain  # type: ignore[misc]
