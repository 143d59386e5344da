"""Short measurements of a machine: each takes a second at most. Rates are bytes or operations per second."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MIB = 2**20
_COPY_BYTES = 128 * _MIB
_FILE_BYTES = 256 * _MIB
_CHUNK = 16 * _MIB


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second of a sequential read; `note` says when the figure is not the disk's own.

    `again` is the rate once the file is in the system's memory, `mapped` that of mapping its pages then.
    """

    read: float | None
    note: str = ""
    again: float | None = None
    mapped: float | None = None


def memory_copy_rate() -> float:
    """Bytes copied per second from RAM to RAM, with the threads PyTorch uses."""
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return _COPY_BYTES / _usual_seconds(lambda: target.copy_(source), at_most=0.5)


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a `size` × `size` matrix product on the CPU."""
    import torch

    matrix = torch.ones(size, size).to(dtype)
    return 2 * size**3 / _usual_seconds(lambda: matrix @ matrix, at_most=0.3)


def link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second from the host's memory, pinned where that is possible, to an accelerator, and back."""
    import torch

    from lowtide.machine.accelerators import accelerator
    from lowtide.machine.pinned_memory import HostBuffer

    kind = accelerator(device)
    assert kind is not None
    buffer = HostBuffer(_COPY_BYTES, device, kind, is_stage=True)
    host = buffer.flat.fill_(1)
    remote = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        kind.synchronize(device)

    forth = _usual_seconds(lambda: copy(remote, host), at_most=0.3)
    back = _usual_seconds(lambda: copy(host, remote), at_most=0.3)
    return _COPY_BYTES / forth, _COPY_BYTES / back


def disk_read_rate(folder: Path, *, seconds: float = 1.0) -> DiskRate:
    """The rate of a sequential read in `folder`, from a temporary file that was first dropped from the page cache.

    Writing and reading stop after `seconds` each, so a slow disk is measured on less than the whole 256 MiB.
    """
    if not hasattr(os, "posix_fadvise"):
        return DiskRate(None, "not measured: this system cannot drop a file from its cache")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lowtide-", buffering=0) as file:
        written = _write_for(seconds, file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cached = _cached_share(file.fileno(), written)
        rate = _read_for(seconds, file.fileno())
        again = _read_for(seconds / 4, file.fileno())
        mapped = _map_for(seconds / 2, Path(file.name), written)
    note = f"{cached:.0%} of the file was still in memory" if cached > 0.01 else ""
    return DiskRate(rate, note, again, mapped)


def _usual_seconds(action: Callable[[], object], *, at_most: float) -> float:
    """The median of repeated runs (one to warm up, then at least one) within about `at_most` seconds."""
    action()
    taken: list[float] = []
    deadline = time.perf_counter() + at_most
    while not taken or time.perf_counter() < deadline:
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _write_for(seconds: float, file: int) -> int:
    """Write up to 256 MiB of bytes that do not compress, each chunk down to the disk; return how many."""
    chunk, written, deadline = os.urandom(_CHUNK), 0, time.perf_counter() + seconds
    while written < _FILE_BYTES and (written == 0 or time.perf_counter() < deadline):
        written += os.write(file, chunk)
        os.fsync(file)
    return written


def _read_for(seconds: float, file: int) -> float:
    buffer = bytearray(_CHUNK)
    offset, start = 0, time.perf_counter()
    while (count := os.preadv(file, [buffer], offset)) > 0:
        offset += count
        if time.perf_counter() - start > seconds:
            break
    return offset / (time.perf_counter() - start)


def _map_for(seconds: float, path: Path, size: int) -> float:
    """Map pages that are in memory and let them go, piece by piece, as the weights of blocks come and go."""
    from lowtide.weights.files import WeightFile
    from lowtide.weights.page_map import bring_in, let_go

    mapping = WeightFile(path).mapping("window")
    offset, start = 0, time.perf_counter()
    while offset < size and (offset == 0 or time.perf_counter() - start < seconds):
        count = min(_CHUNK, size - offset)
        bring_in(mapping.address + offset, count)
        let_go(mapping.address + offset, count)
        offset += count
    return offset / (time.perf_counter() - start)


def _cached_share(file: int, size: int) -> float:
    """The share of the file's first `size` bytes that is in the page cache, as `mincore` tells."""
    pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    with mmap.mmap(file, size) as view:
        first = ctypes.c_ubyte.from_buffer(view)
        answer = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), present)
        del first
    if answer != 0:
        return 1.0
    return sum(flag & 1 for flag in present) / pages
