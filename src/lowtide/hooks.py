"""The function API of group offloading, for any `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lowtide.memory.attach import attach, detach
from lowtide.memory.presets import group_rule, stream_for


def apply_group_offloading(
    module: nn.Module,
    onload_device: torch.device | str,
    offload_device: torch.device | str = "cpu",
    offload_type: str = "block_level",
    num_blocks_per_group: int | None = None,
    non_blocking: bool = False,
    use_stream: bool = False,
    record_stream: bool = False,
    low_cpu_mem_usage: bool = False,
    offload_to_disk_path: str | None = None,
    block_modules: Collection[str] | None = None,
    exclude_kwargs: Collection[str] | None = None,
) -> None:
    """Keep a module's weights away from `onload_device`, and bring them there group by group as they are called.

    `offload_type` "block_level" takes `num_blocks_per_group` (default 1) of the innermost repeated blocks at once, or
    of the lists called `block_modules`; "leaf_level" every module that holds weights. `use_stream` loads the next
    group while one computes, for the memory of one group more. Weights rest in host memory, pinned if `use_stream` and
    not `low_cpu_mem_usage`; with `offload_to_disk_path`, or where `onload_device` is the CPU, on disk: in the very
    checkpoint they came from, else (only with the path) in an unnamed file in that folder. Keyword arguments of the
    module named in `exclude_kwargs` are not moved to the device. `non_blocking` and `record_stream` are accepted and
    have no effect: copies never block, and events order them.
    The results are those of the module without this, bit for bit. Any other plan may be applied afterwards;
    `disable_group_offloading` undoes it. Raises `ValueError` for what is not possible, `OSError` if the disk is full.
    """
    device, rule = group_rule(
        onload_device,
        offload_device,
        offload_type,
        num_blocks_per_group,
        non_blocking,
        use_stream,
        record_stream,
        low_cpu_mem_usage,
        offload_to_disk_path,
        block_modules,
    )
    attach(module, rule, stream_for(device, rule), exclude_kwargs=exclude_kwargs or ())


def disable_group_offloading(module: nn.Module) -> None:
    """Undo `apply_group_offloading`: the weights are where they were before. Does nothing where it was not applied."""
    detach(module)
