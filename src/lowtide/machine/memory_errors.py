"""Errors that say that memory ran out, of a device or of the host: every library and driver has its own words."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Literal

import torch

from lowtide.machine.accelerators import accelerator, devices_in_use
from lowtide.machine.host import host_memory

_DEVICE = re.compile(
    r"(cuda|hip|xpu) out of memory|mps backend out of memory|invalid buffer size"
    r"|(cu|hip)(blas|dnn|fft|solver|sparse)\w*alloc_failed|rocblas_status_memory_error|miopenstatusallocfailed"
    r"|cudnn_status_internal_error_device_allocation_failed"
    r"|out_of_device_memory|out_of_resources|callbackerroroutofmemory"  # SYCL, Level Zero; Metal
)
_HOST = re.compile(
    r"defaultcpuallocator|bad_alloc|bad allocation|(can't|cannot) allocate memory|out_of_host_memory"
    r"|cudnn_status_internal_error_host_allocation_failed|paging file is too small"
)
_EITHER = re.compile(
    r"out of memory|not enough memory|failed to allocate|cudaerrormemoryallocation|hiperroroutofmemory|out_of_memory"
    r"|could not create a memory"  # oneDNN
)
_ANYTHING = re.compile(
    r"unable to find an engine|unable to find a valid cudnn algorithm"
    r"|(cublas|hipblas|cudnn)_status_not_initialized|cudnn_status_(internal_error|not_supported)"
    r"|miopenstatus(internal|unknown)error"
)
_FAULT = re.compile(
    r"illegal memory access|misaligned address|device-side assert|launch failure|device_lost|already mapped"
)
_SHORT = 0.25
"""Of a device's memory: with less of it left, errors that may mean anything are taken to mean memory."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out under the smallest plan there is; `latents` is the file of what was made so far, if anything."""

    def __init__(self, message: str, latents: Path | None = None) -> None:
        super().__init__(message)
        self.latents = latents


def out_of(error: BaseException, device: torch.device | None = None) -> Literal["device", "host"] | None:
    """Which memory ran out, by an error that was just raised; None for an error of another kind, and for our own.

    `device` computes; None is an accelerator in use, if there is one. Some errors name no memory: CUDA says the same
    of a device and of pinned host memory, and of those two it is the one of which less is left. Libraries also report
    otherwise that they got no memory of the device; that counts where there is little left.
    """
    if isinstance(error, OutOfMemoryError):
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    return _in_words(str(error).lower(), device) if isinstance(error, RuntimeError) else None


def _in_words(text: str, device: torch.device | None) -> Literal["device", "host"] | None:
    if _FAULT.search(text):
        return None
    if _DEVICE.search(text):
        return "device"
    if _HOST.search(text):
        return "host"
    if _EITHER.search(text) or _has_no_room_for_a_kernel(text):
        host = host_memory()
        return "host" if host.available / host.total <= _left(device) else "device"
    return "device" if _ANYTHING.search(text) and _left(device) < _SHORT else None


def _has_no_room_for_a_kernel(text: str) -> bool:
    """OneDNN's words for that; with "descriptor" they mean a shape that it does not take."""
    begins = text.startswith(("could not create a primitive", "could not execute a primitive"))
    return begins and "descriptor" not in text


def _left(device: torch.device | None) -> float:
    """The share of a device's memory that other libraries can have: not what PyTorch holds; all of it without one."""
    device = device or next((used for used, _ in devices_in_use()), torch.device("cpu"))
    kind = accelerator(device)
    if kind is None:
        return 1.0
    try:
        memory = kind.memory(device)
    except RuntimeError:  # it answers nothing any more, so memory is not what is wrong
        return 1.0
    return (memory.free - memory.unused) / memory.total
