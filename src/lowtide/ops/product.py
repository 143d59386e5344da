"""Products with the weights of linear layers, by the library that multiplies fastest on this processor.

In float32 PyTorch multiplies by Intel's MKL, which keeps its fast kernels for Intel's processors. oneDNN, which PyTorch
has too, does not: on an AMD EPYC with AVX-512 it takes 0.36 to 0.61 of the time, on one held to AVX2 0.6 to 0.95.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from lowtide.ops.meta_device import device_type
from lowtide.ops.modes import is_traced, take_gradients
from lowtide.ops.packed import packed_product

WIDE = 64
"""Columns of a weight that oneDNN brings to its order at a time, each up to `DEEP` numbers long."""
DEEP = 1024
SHARES_CACHE_LINES = 4096
"""Rows of a multiple of so many numbers are copied, `WIDE` at a time: they would drive each other from a cache."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `[..., I]` with a weight `[O, I]` to `[..., O]`, and add the bias.

    Where gradients are taken, where a trace is made (which is to load without us), and for every dtype but float32,
    PyTorch chooses.
    """
    is_usual = x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous()
    is_here = BY_ONEDNN and device_type(x) == "cpu"
    if not is_usual or not is_here or is_traced() or take_gradients(x, weight):
        return F.linear(x, weight, bias_O)
    if x.is_meta:
        room = x.new_empty(scratchpad(x.shape[-1]))
        made = F.linear(x, weight, bias_O)
        del room
        return made
    return packed_product(x, weight, bias_O)


def scratchpad(inner: int) -> int:
    """Numbers that oneDNN has beside a product, at most (PyTorch 2.13 with oneDNN 3.12)."""
    copied = WIDE * (inner + 2 * WIDE) if inner % SHARES_CACHE_LINES == 0 else 0
    return torch.get_num_threads() * (WIDE * min(-(-inner // 16) * 16, DEEP) + 256 + copied)


def _maker() -> str:
    """Of the processor; "" where it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return next((name for name in ("GenuineIntel", "AuthenticAMD") if name in platform.processor()), "")
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in fields if name.strip() == "vendor_id"), "")


BY_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()  # pyright: ignore[reportAttributeAccessIssue]
    and _maker() not in ("", "GenuineIntel")
)
"""Whether oneDNN is the faster one here."""
