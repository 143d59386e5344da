"""Which memory ran out, by the words of every library that says so; what else went wrong is not taken for it."""

from __future__ import annotations

import pytest
import torch
from tests.sim_device import Sim
from tests.sim_tensor import simulated

from lowtide.machine import memory_errors
from lowtide.machine.device_kinds import DeviceMemory
from lowtide.machine.host import HostMemory
from lowtide.machine.memory_errors import OutOfMemoryError, out_of

SIM = torch.device("sim", 1)
CPU = torch.device("cpu")
ASYNCHRONOUS = (
    "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/ for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
DEVICE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.92 GiB"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 MiB. GPU 7 has a total capacity of 287.98 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 15.57 GiB."),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB, max allowed: 88.13 GiB). "
        "Tried to allocate 33.92 GiB on private pool."
    ),
    RuntimeError("Invalid buffer size: 40.00 GiB"),
    RuntimeError("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
]
HOST = [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError("std::bad_alloc"),
    RuntimeError("level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("The paging file is too small for this operation to complete. (os error 1455)"),
]
EITHER = [
    torch.AcceleratorError(f"CUDA error: out of memory{ASYNCHRONOUS}"),  # of `cudaHostAlloc` too
    RuntimeError("CUDA driver error: out of memory"),
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not execute a primitive"),
]
ANYTHING = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    RuntimeError("miopenStatusUnknownError"),
]
NEITHER = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: misaligned address"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    torch.AcceleratorError("CUDA error: part or all of the requested memory range is already mapped"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
    OSError(28, "No space left on device"),
    OutOfMemoryError("Memory ran out in 'denoise' under the smallest plan there is (CUDA out of memory)."),
]


def left(sim: Sim, monkeypatch: pytest.MonkeyPatch, *, device: float, host: float, unused: int = 0) -> None:
    """Have these shares left of the device's memory, as other libraries can have it, and of the host's."""
    memory = DeviceMemory(int(device * 1000) + unused, 1000, unused)
    monkeypatch.setattr(sim, "memory", lambda _: memory)
    monkeypatch.setattr(memory_errors, "host_memory", lambda: HostMemory(1000, int(host * 1000), limited=False))


@pytest.fixture(params=[(0.01, 0.9), (0.9, 0.01)], ids=["little on the device", "little on the host"])
def sim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    with simulated() as sim:
        left(sim, monkeypatch, device=request.param[0], host=request.param[1])
        yield sim


def said(errors: list[BaseException]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("error", errors, ids=lambda error: f"{type(error).__name__} {error}"[:60])


@said(DEVICE)
def test_of_the_device(sim: Sim, error: BaseException) -> None:
    assert out_of(error, SIM) == "device"
    assert out_of(error) == "device"


@said(HOST)
def test_of_the_host(sim: Sim, error: BaseException) -> None:
    assert out_of(error, SIM) == out_of(error, CPU) == out_of(error) == "host"


@said(EITHER)
def test_what_names_no_memory_means_that_of_which_less_is_left(sim: Sim, error: BaseException) -> None:
    is_of_device = sim.memory(SIM).free < 500
    assert out_of(error, SIM) == ("device" if is_of_device else "host")
    assert out_of(error, CPU) == out_of(error) == "host", "where no accelerator is in use"
    kept = torch.empty(1, device=SIM)
    assert out_of(error) == out_of(error, SIM)
    assert kept.device == SIM


@said(ANYTHING)
def test_what_may_mean_anything_means_memory_where_little_is_left(sim: Sim, error: BaseException) -> None:
    is_short = sim.memory(SIM).free < 500
    assert out_of(error, SIM) == ("device" if is_short else None)
    assert out_of(error, CPU) is None


def test_what_pytorch_holds_and_does_not_use_is_not_left_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated() as sim:
        left(sim, monkeypatch, device=0.01, host=0.5, unused=600)
        assert out_of(ANYTHING[0], SIM) == "device"


def test_a_device_that_answers_no_more_did_not_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(_: torch.device) -> DeviceMemory:
        raise NEITHER[1]

    with simulated() as sim:
        monkeypatch.setattr(sim, "memory", memory)
        assert out_of(ANYTHING[0], SIM) is None


@said(NEITHER)
def test_what_else_goes_wrong_is_not_memory(sim: Sim, error: BaseException) -> None:
    assert out_of(error, SIM) is None
    assert out_of(error, CPU) is None
