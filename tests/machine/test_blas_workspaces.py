"""Workspaces of cuBLAS, worked out by hand, and what is free of a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowtide.machine.blas_workspaces import blas_workspaces
from lowtide.machine.device_kinds import Accelerator, Cuda, DeviceMemory

MIB = 2**20
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "before Hopper": ({"capability": "8.9"}, 8_519_680 + MIB),
    "not known": ({"capability": None}, 8_519_680 + MIB),
    "Hopper": ({"capability": "9.0"}, 33 * MIB),
    "Blackwell": ({"capability": "12.0"}, 33 * MIB),
    "as for equal bits": ({"environment": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}, 33 * MIB),
    "two sizes": ({"environment": {"CUBLAS_WORKSPACE_CONFIG": ":4096:1:16:4"}}, 4 * MIB + 64 * 1024 + MIB),
    "so little that Lt has no more": ({"environment": {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}}, 2 * 128 * 1024),
    "not understood": ({"environment": {"CUBLAS_WORKSPACE_CONFIG": "much"}}, 8_519_680 + MIB),
    "Lt's own": ({"environment": {"CUBLASLT_WORKSPACE_SIZE": "4096"}}, 8_519_680 + 4 * MIB),
    "ROCm": ({"on_rocm": True}, 108 * MIB),
    "ROCm, as asked for": ({"on_rocm": True, "environment": {"HIPBLAS_WORKSPACE_CONFIG": ":1024:2"}}, 78 * MIB),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_one_thread_and_stream(name: str) -> None:
    given, nbytes = CASES[name]
    assert blas_workspaces(**{"capability": "8.6", "environment": {}, **given}) == nbytes


def test_of_a_device_that_is_not_here_and_of_other_kinds() -> None:
    assert Cuda("cuda").workspaces(torch.device("cuda", 99)) == blas_workspaces(None)
    assert Accelerator("xpu").workspaces(torch.device("xpu", 0)) == 0


@pytest.mark.parametrize(
    ("share", "free"),
    [(None, 3000 + 1500), (1.0, 3000 + 1500), (0.5, 1000 + 1500), (0.3, 1500)],
)
def test_free_is_what_the_driver_has_and_what_is_reserved_and_unused(
    share: float | None, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10000 bytes 4000 are reserved, 2500 of these in use; others have 3000. A share of them may be all there is."""
    torch_of_kind = SimpleNamespace(
        mem_get_info=lambda _: (3000, 10000), memory_reserved=lambda _: 4000, memory_allocated=lambda _: 2500
    )
    if share is not None:
        torch_of_kind.get_per_process_memory_fraction = lambda _: share
    monkeypatch.setattr(Accelerator, "_torch", torch_of_kind)
    total = int(10000 * (share or 1.0))
    assert Accelerator("cuda").memory(torch.device("cuda", 0)) == DeviceMemory(free, total, 1500)
