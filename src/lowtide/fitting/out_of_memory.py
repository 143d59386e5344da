"""Out of memory: what it looks like in its many forms, and what we raise when nothing smaller is left to try."""

from __future__ import annotations

import errno
from pathlib import Path

import torch

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "could not create a memory",
    "failed to allocate",
)


class OutOfMemoryError(RuntimeError):
    """Memory ran out under the smallest plan there is; `latents` is the file of what was made so far, if anything."""

    def __init__(self, message: str, latents: Path | None = None) -> None:
        super().__init__(message)
        self.latents = latents


def is_of_device(error: BaseException, device: torch.device) -> bool:
    """Whether it is a device's own memory that ran out; a CPU's is the host's."""
    is_cuda = isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower()
    return device.type == "cpu" or is_cuda


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's and the CPU's allocator, Python, mappings, oneDNN."""
    if isinstance(error, OutOfMemoryError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    signs = any(sign in text for sign in _SIGNS)
    # oneDNN's word for no room to compile a kernel; with "descriptor" it means a shape that it does not take
    no_room = text.startswith(("could not create a primitive", "could not execute a primitive"))
    return isinstance(error, RuntimeError) and (signs or (no_room and "descriptor" not in text))
