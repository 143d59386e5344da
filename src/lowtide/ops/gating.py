"""A gated linear unit's gate, some rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowtide.ops.meta_device import device_type
from lowtide.ops.modes import is_traced, take_gradients

AT_ONCE = 2**20
"""Numbers of a gate that are held between two steps on a CPU: few, which stay in its cache."""


def gated_gelu(wide: torch.Tensor) -> torch.Tensor:
    """The first half of the features times GELU of the second (Shazeer 2020, eq. 6): `[..., 2 C]` to `[..., C]`."""
    value, gate = wide.chunk(2, dim=-1)
    is_elsewhere = device_type(wide) != "cpu" or not wide.is_contiguous()
    if is_elsewhere or is_traced() or take_gradients(wide):
        return value * F.gelu(gate)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    step = max(1, AT_ONCE // max(1, gate.shape[-1]))
    rows = (x.reshape(-1, gate.shape[-1]).split(step) for x in (value, gate, out))
    for some_value, some_gate, target in zip(*rows, strict=True):
        torch.mul(some_value, F.gelu(some_gate), out=target)
    return out
