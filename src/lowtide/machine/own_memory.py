"""Print what a process takes by itself: `python -m lowtide.machine.own_memory DEVICE DTYPE MODULE...`.

Two numbers of bytes: resident memory once the modules are imported and a few kernels have run, and what is free on the
device then (0 for a CPU).
"""

from __future__ import annotations

import sys
from importlib import import_module

import psutil
import torch
import torch.nn.functional as F

from lowtide.machine.accelerators import accelerator
from lowtide.machine.heap import steady_malloc, trim_heap


def compute_a_little(device: torch.device, dtype: torch.dtype) -> None:
    """Run a kernel of each kind, on the device and on meta: libraries load and set up their own memory then."""
    x = torch.ones(1, 32, 16, 16, device=device, dtype=dtype)
    F.conv2d(x, torch.ones(32, 32, 3, 3, device=device, dtype=dtype), padding=1)
    F.linear(x[0, 0], x[0, 1])
    F.scaled_dot_product_attention(x, x, x)
    on_meta = x.to("meta")
    F.interpolate(F.group_norm(on_meta, 4), scale_factor=2).add(1)


def main(device_name: str, dtype: str, *modules: str) -> None:
    """Measure and print."""
    steady_malloc()
    for module in modules:
        import_module(module)
    device = torch.device(device_name)
    with torch.no_grad():
        compute_a_little(device, getattr(torch, dtype))
    free = 0
    kind = accelerator(device)
    if kind is not None:
        kind.synchronize(device)
        free = kind.memory(device).free
    trim_heap()
    print(psutil.Process().memory_info().rss, free)


if __name__ == "__main__":
    main(*sys.argv[1:])
