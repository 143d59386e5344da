"""On which device and in which dtype a run computes, from `--device` and `--dtype`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.cli.errors import InputError, tell
from lowtide.cli.request import DType

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. Raises `InputError` for one that is not here."""
    import torch

    from lowtide.machine.accelerators import best_device, is_here, obstacle

    device = best_device() if name == "auto" else torch.device(name)
    if not is_here(device):
        raise InputError(f"--device {name}: {obstacle(device)}. Use --device cpu; `lowtide doctor` tells more.")
    return device


def resolve_dtype(name: DType, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is float32 on a CPU and float16 on a GPU."""
    import torch

    if name is DType.AUTO:
        return torch.float32 if device.type == "cpu" else torch.float16
    if name is DType.FLOAT16 and device.type == "cpu":
        tell("Warning: float16 is emulated on a CPU and very slow. Use --dtype bfloat16 or float32.")
    return getattr(torch, name.value)
