"""Functions that put group offloading and layerwise casting on any `torch.nn.Module`, and take them off again."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from lowtide.casting.apply_casting import apply_casting, casting_rule, remove_casting
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
    not `low_cpu_mem_usage`; with `offload_to_disk_path`, or where `onload_device` is the CPU, on disk: in the
    checkpoint they came from, else (only with the path) in an unnamed file in that folder. Keyword arguments of the
    module named in `exclude_kwargs` are not moved to the device. `non_blocking` and `record_stream` are accepted and
    have no effect: copies never block, and events order them.
    The results are those of the module without offloading, bit for bit. Any other plan may be applied afterwards;
    `disable_group_offloading` undoes it. Raises `ValueError` for arguments that are not possible, `OSError` if the disk
    is full.
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
    """Undo `apply_group_offloading`: weights are where they were before. Does nothing to a module without it."""
    detach(module)


def apply_layerwise_casting(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Collection[str] | None = "auto",
    skip_modules_classes: Collection[type[nn.Module]] | None = None,
    non_blocking: bool = False,
    *,
    scaled: bool = False,
    fp8_matmul: bool = False,
) -> None:
    """Let the weights of convolutions, linear layers and embeddings rest in `storage_dtype`, 8 or 4 bits.

    They are turned into `compute_dtype` around the calls of their layers. `storage_dtype` is torch.float8_e4m3fn or
    torch.float8_e5m2, a plain cast; with `scaled`, each output channel has a scale. torch.int8 is always scaled;
    torch.int4 has a scale for every 32 numbers, and int8 for weights whose rows are no multiple of 32. Relative errors
    of a product, whatever the size of the weights: e4m3fn scaled 2.6 %, int8 0.8 %, int4 8.2 %; a plain e4m3fn cast has
    2.7 % for weights of deviation 0.05, 11 % for 0.005, 56 % for 0.001.
    Modules whose name matches a pattern (`re.search`) of `skip_modules_pattern`, or that are of `skip_modules_classes`,
    stay as they are, with all inside them; "auto" means `lowtide.casting.casting.NEVER_CAST`. If both are None, every
    module is cast. Weights that are not cast get the `compute_dtype`. `non_blocking` is accepted and has no effect.
    `fp8_matmul` has linear layers multiply in fp8, their inputs rounded as well (3.7 % in all): for GPUs that do
    (compute capability 8.9 or more), with e4m3fn and bfloat16.
    Weights are cast one after another, so memory falls from the first one on. An offload, applied before or after,
    moves the small bytes. `disable_layerwise_casting` undoes it. Raises `ValueError` for arguments that are not
    possible.
    """
    rule = casting_rule(
        storage_dtype, compute_dtype, skip_modules_pattern, skip_modules_classes, scaled=scaled, fp8_matmul=fp8_matmul
    )
    apply_casting(module, rule)
    del non_blocking


def disable_layerwise_casting(module: nn.Module) -> None:
    """Undo `apply_layerwise_casting`: weights that came from a checkpoint are again as its file has them.

    Other weights keep the values of that form, with a warning. Does nothing where nothing is cast.
    """
    remove_casting(module)
