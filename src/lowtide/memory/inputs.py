"""The inputs of a call, brought to the device where it computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lowtide.machine.accelerators import brought_to


def on_device(
    device: torch.device, args: Any, kwargs: dict[str, Any], excluded: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """The arguments with their tensors on `device`; keywords that are `excluded` are left alone, and all on a CPU."""
    if device.type == "cpu":
        return args, kwargs
    moved = {name: value for name, value in kwargs.items() if name not in excluded}
    args, moved = tree_map_only(torch.Tensor, lambda tensor: brought_to(device, tensor), (args, moved))
    return args, {**kwargs, **moved}
