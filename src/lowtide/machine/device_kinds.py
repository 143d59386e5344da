"""Kinds of accelerators: all that is asked of a device beside the CPU, once for each kind that PyTorch drives.

Whatever a kind is missing is known here, and nowhere else; `lowtide.machine.accelerators` says which device is of which
kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.machine.blas_workspaces import blas_workspaces

_FOR_ALL_DEVICES = 1
"""`cudaHostRegisterPortable`, and `hipHostRegisterPortable`."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory: `free` for this process; of these its allocator holds `unused` ones already."""

    free: int
    total: int
    unused: int = 0


class Accelerator:
    """A kind of device that has streams, such as CUDA's (ROCm's is called so too) and XPU's.

    `has_streams` says whether copies can run beside computing, ordered by events; `reads_at_once`, whether a copy of
    host memory that is not pinned has read all of it when the call returns, although it is not done; `registers`,
    whether memory that exists already can be pinned, byte for byte.
    """

    has_streams = True
    reads_at_once = False
    registers = False

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @property
    def _torch(self) -> Any:
        return getattr(torch, self.kind)

    # ---- what is here

    def count(self) -> int:
        """How many of them PyTorch can use here."""
        return self._torch.device_count() if self._torch.is_available() else 0

    def is_in_use(self, device: torch.device) -> bool:
        """Whether this process holds memory of it; nothing is begun by asking."""
        return self._torch.is_initialized() and self._torch.memory_reserved(device) > 0

    def name(self, device: torch.device) -> str:
        """What its maker calls it."""
        return self._torch.get_device_name(device)

    def capability(self, device: torch.device) -> str | None:
        """The version of what it can compute, where its maker counts so."""
        return None

    def shares_host_memory(self, device: torch.device) -> bool:
        """Whether its memory is the host's, as in integrated devices: what rests on the host then takes it twice."""
        return bool(getattr(self._torch.get_device_properties(device), "is_integrated", False))

    # ---- memory

    def memory(self, device: torch.device) -> DeviceMemory:
        """What is free for this process, and what there is, of the share that it may have."""
        free, total = self._torch.mem_get_info(device)
        reserved = self._torch.memory_reserved(device)
        unused = max(reserved - self._torch.memory_allocated(device), 0)
        share = getattr(self._torch, "get_per_process_memory_fraction", None)  # not in every release
        if share is not None:
            total = int(total * share(device))
            free = min(free, max(total - reserved, 0))
        return DeviceMemory(free + unused, total, unused)

    def allocated(self, device: torch.device) -> int:
        """Bytes of tensors now."""
        return self._torch.memory_allocated(device)

    def peaks(self, device: torch.device) -> tuple[int, int]:
        """The most bytes of tensors, and the most that the allocator held, since `begin_peaks`."""
        return self._torch.max_memory_allocated(device), self._torch.max_memory_reserved(device)

    def begin_peaks(self, device: torch.device) -> None:
        """Begin the peaks anew."""
        self._torch.reset_peak_memory_stats(device)

    def workspaces(self, device: torch.device) -> int:
        """Bytes of its allocator that libraries keep for one thread on one stream; it need not be here."""
        return 0

    def give_back(self, device: torch.device) -> None:
        """Have the allocator return to the driver what it holds and does not use."""
        with self.on(device):
            self._torch.empty_cache()

    def limit(self, device: torch.device, nbytes: int | None) -> None:
        """Have the allocator hold at most so many bytes, or, with None, as many as there are.

        What it is asked for beyond them raises `torch.OutOfMemoryError`, as on a device that has no more.
        """
        total = self._torch.get_device_properties(device).total_memory
        self._torch.set_per_process_memory_fraction(1.0 if nbytes is None else min(nbytes / total, 1.0), device)

    # ---- streams and time

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done all that it was asked for."""
        self._torch.synchronize(device)

    def new_stream(self, device: torch.device) -> Any:
        """A stream beside the one that computes; it has `record_event`, `wait_event` and `wait_stream`."""
        return self._torch.Stream(device)

    def computing(self, device: torch.device) -> Any:
        """The stream of this thread."""
        return self._torch.current_stream(device)

    def timed_event(self, device: torch.device) -> Any:
        """An event of this thread's stream, recorded now, with `elapsed_time` (in milliseconds) to a later one."""
        event = self._torch.Event(enable_timing=True)
        event.record(self.computing(device))
        return event

    def is_capturing(self, device: torch.device) -> bool:
        """Whether what this thread asks for now is recorded in a graph, and not done."""
        return False

    @contextmanager
    def on(self, device: torch.device, stream: Any = None) -> Generator[None]:
        """Make `device`, and where one is given its `stream`, those of this thread for a while."""
        with self._torch.device(device):
            if stream is None:
                yield
            else:
                with self._torch.stream(stream):
                    yield

    # ---- random numbers

    def random_state(self, device: torch.device) -> torch.Tensor:
        """Where its own generator stands, which draws where none is given; the host waits for nothing."""
        return self._torch.get_rng_state(device)

    def set_random_state(self, device: torch.device, state: torch.Tensor) -> None:
        """Have that generator go on from there."""
        self._torch.set_rng_state(state, device)

    # ---- host memory that the device reads

    def pin(self, flat: torch.Tensor, device: torch.device) -> bool:
        """Lock a tensor's very bytes so that they are copied at full speed; whether that was possible.

        `lowtide.machine.pinned_memory` is who asks: it knows how much is pinned already.
        """
        if not self.registers:
            return False
        with self.on(device):
            is_pinned = self._register(flat)
            if not is_pinned:
                self._forget_error(device)
                warnings.warn(f"Host memory could not be pinned for {device}: copies from it are slower.", stacklevel=2)
        return is_pinned

    def unpin(self, flat: torch.Tensor, device: torch.device) -> None:
        """Undo `pin`, before the memory is freed. No copy from it may be under way."""
        if self.registers:
            with self.on(device):
                if not self._unregister(flat):
                    self._forget_error(device)

    def pinned_stage(self, nbytes: int) -> torch.Tensor | None:
        """Pinned memory of PyTorch's own allocator, flat uint8, where no other can be pinned; None where there is none.

        It rounds up to a power of two, and keeps what it has: for a few buffers of such a size.
        """
        return None

    def _register(self, flat: torch.Tensor) -> bool:
        raise NotImplementedError

    def _unregister(self, flat: torch.Tensor) -> bool:
        raise NotImplementedError

    def _forget_error(self, device: torch.device) -> None:
        """Clear the error that a failed call of the runtime left to this thread: the next launch would raise it.

        So this launches something. PyTorch has no other way to it, and what is wrong for good is raised again.
        """
        with suppress(RuntimeError):
            torch.ones(1, device=device)


class Cuda(Accelerator):
    """NVIDIA's devices, and AMD's through ROCm.

    A copy from pageable memory goes through memory of the driver, which is filled at once (CUDA Runtime API, "API
    synchronization behavior").
    """

    reads_at_once = True
    registers = True

    def capability(self, device: torch.device) -> str:
        """Such as "9.0"."""
        return ".".join(map(str, torch.cuda.get_device_capability(device)))

    def workspaces(self, device: torch.device) -> int:
        """Those of cuBLAS and cuBLASLt, or of ROCm's libraries."""
        capability = self.capability(device) if (device.index or 0) < self.count() else None
        return blas_workspaces(capability, on_rocm=torch.version.hip is not None)

    def is_capturing(self, device: torch.device) -> bool:
        """As CUDA says."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def _register(self, flat: torch.Tensor) -> bool:
        runtime: Any = torch.cuda.cudart()
        return int(runtime.cudaHostRegister(flat.data_ptr(), flat.numel(), _FOR_ALL_DEVICES)) == 0

    def _unregister(self, flat: torch.Tensor) -> bool:
        runtime: Any = torch.cuda.cudart()
        return int(runtime.cudaHostUnregister(flat.data_ptr())) == 0


class Xpu(Accelerator):
    """Intel's devices."""

    def pinned_stage(self, nbytes: int) -> torch.Tensor | None:
        """From PyTorch's allocator: SYCL registers no memory that exists already."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            warnings.warn("Host memory could not be pinned for xpu: copies from it are slower.", stacklevel=2)
            return None


class Mps(Accelerator):
    """Apple's devices: one of them, which shares the host's memory, with one queue for copying and computing."""

    has_streams = False

    def count(self) -> int:
        """One, or none."""
        return int(torch.backends.mps.is_available())

    def is_in_use(self, device: torch.device) -> bool:
        """Whether this process holds memory of it."""
        return torch.mps.driver_allocated_memory() > 0

    def name(self, device: torch.device) -> str:
        """What PyTorch calls it."""
        return "Apple MPS"

    def shares_host_memory(self, device: torch.device) -> bool:
        """It does."""
        return True

    def memory(self, device: torch.device) -> DeviceMemory:
        """Of what Metal recommends that a process uses."""
        total = torch.mps.recommended_max_memory()
        return DeviceMemory(max(total - torch.mps.current_allocated_memory(), 0), total)

    def allocated(self, device: torch.device) -> int:
        """Bytes of tensors now."""
        return torch.mps.current_allocated_memory()

    def peaks(self, device: torch.device) -> tuple[int, int]:
        """What is in use now: Metal keeps no peaks."""
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()

    def begin_peaks(self, device: torch.device) -> None:
        """There are none."""

    def give_back(self, device: torch.device) -> None:
        """Have the allocator return what it holds and does not use."""
        torch.mps.empty_cache()

    def limit(self, device: torch.device, nbytes: int | None) -> None:
        """Have the allocator hold at most so many bytes of what Metal recommends."""
        total = torch.mps.recommended_max_memory()
        torch.mps.set_per_process_memory_fraction(1.0 if nbytes is None else min(nbytes / total, 1.0))

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done all that it was asked for."""
        torch.mps.synchronize()

    def timed_event(self, device: torch.device) -> Any:
        """An event recorded now."""
        event = torch.mps.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def on(self, device: torch.device, stream: Any = None) -> Generator[None]:
        """There is one device, and one stream."""
        yield

    def random_state(self, device: torch.device) -> torch.Tensor:
        """There is one generator."""
        return torch.mps.get_rng_state()

    def set_random_state(self, device: torch.device, state: torch.Tensor) -> None:
        """Have it go on from there."""
        torch.mps.set_rng_state(state)
