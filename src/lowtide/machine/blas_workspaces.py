"""The memory that libraries of matrix products work in: PyTorch allocates it for each of their handles and streams.

By the rules of PyTorch's `CublasHandlePool.cpp`. It comes from PyTorch's own allocator at the first product and
stays, so it is in `torch.cuda.max_memory_allocated`; the context, which is not, is counted against the device alone.
One thread that computes on one stream has one workspace of cuBLAS and one of cuBLASLt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

KIB = 2**10
CUBLAS, CUBLAS_FROM_HOPPER = (2 * 4096 + 8 * 16) * KIB, 8 * 4096 * KIB
"""Bytes: `:4096:2:16:8`, which is 8,519,680, and 32 MiB from compute capability 9.0 on."""
CUBLASLT = 1024 * KIB
HIPBLAS, HIPBLASLT = 32 * 1024 * KIB, 76 * 1024 * KIB
"""On ROCm. Of gfx94 and gfx95 it is 128 MiB instead of 32, which is left to be measured."""
HOPPER = 9


def blas_workspaces(
    capability: str | None, *, on_rocm: bool = False, environment: Mapping[str, str] = os.environ
) -> int:
    """Bytes of one thread's workspaces on one stream, on a device of this compute capability, such as "8.9".

    A device of which it is not known is taken for one before Hopper.
    """
    if on_rocm:
        asked = ("CUBLAS_WORKSPACE_CONFIG", "HIPBLAS_WORKSPACE_CONFIG", "ROCBLAS_WORKSPACE_CONFIG")
        usual, lt, usual_lt = HIPBLAS, ("CUBLASLT_WORKSPACE_SIZE", "HIPBLASLT_WORKSPACE_SIZE"), HIPBLASLT
    else:
        is_hopper = capability is not None and int(capability.partition(".")[0]) >= HOPPER
        asked = ("CUBLAS_WORKSPACE_CONFIG",)
        usual, lt, usual_lt = CUBLAS_FROM_HOPPER if is_hopper else CUBLAS, ("CUBLASLT_WORKSPACE_SIZE",), CUBLASLT
    config = next((environment[name] for name in asked if name in environment), "")
    kibibytes = next((environment[name] for name in lt if name in environment), "")
    own_lt = int(kibibytes) * KIB if kibibytes.isdecimal() else usual_lt
    own = _configured(config) or usual
    return own + (own_lt if on_rocm else min(own_lt, own))


def _configured(config: str) -> int:
    """Bytes of ":SIZE:COUNT" once or several times, with sizes in KiB; 0 for other text."""
    return sum(int(size) * int(count) * KIB for size, count in re.findall(r":(\d+):(\d+)", config))
