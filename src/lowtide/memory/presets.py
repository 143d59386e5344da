"""The named offloads (sequential, model, group, partial residency), each written as a rule."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lowtide.machine.accelerators import accelerator, best_device, is_here, obstacle
from lowtide.memory.attach import Attachment, attach, detach
from lowtide.memory.device_stream import DeviceStream
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.memory.stream import Stream
from lowtide.sizes import parse_bytes
from lowtide.weights.index import CheckpointIndex

OFFLOAD_TYPES = {"block_level": Level.BLOCK, "leaf_level": Level.LEAF}


def execution_device(device: torch.device | str | int | None = None, gpu_id: int | None = None) -> torch.device:
    """The device to compute on: the one asked for; else the accelerator `gpu_id`, or the CPU where there is none.

    Raises `ValueError` for a device that is not there, or for two that contradict each other.
    """
    asked = None if device is None else torch.device(device)
    if asked is None and gpu_id is None:
        asked = best_device()
    elif asked is None:
        asked = torch.device(best_device().type.replace("cpu", "cuda"), int(gpu_id or 0))
    elif gpu_id is not None and asked.index not in (None, gpu_id):
        raise ValueError(f"gpu_id={gpu_id} and device={str(asked)!r} contradict each other: give one of them.")
    elif gpu_id is not None and asked.type != "cpu":
        asked = torch.device(asked.type, int(gpu_id))
    if not is_here(asked):
        raise ValueError(
            f"device={str(asked)!r} is not possible: {obstacle(asked)}. Leave it out or say 'cpu': weights then rest "
            "on disk and come to memory when they are needed."
        )
    return torch.device("cpu") if asked.type == "cpu" else torch.device(asked.type, asked.index or 0)


def resting_tier(device: torch.device, rest: Tier | str | None = None) -> Tier:
    """Where weights rest unless said otherwise: on the host beside a device with memory of its own, else on disk."""
    if rest is None:
        kind = accelerator(device)
        return Tier.DISK if kind is None or kind.shares_host_memory(device) else Tier.HOST
    if rest not in (Tier.HOST, Tier.DISK):
        raise ValueError(f"rest={rest!r} is not possible: weights rest on 'host' or on 'disk'.")
    return Tier(rest)


def stream_for(device: torch.device, rule: Rule) -> Stream:
    """A stream that serves `rule` on `device`."""
    kind = accelerator(device)
    if kind is not None and kind.has_streams:
        return DeviceStream(device, kind, prefetch=rule.prefetch, prefetch_bytes=rule.prefetch_bytes)
    return Stream(device, prefetch=rule.prefetch, prefetch_bytes=rule.prefetch_bytes)


def sequential_rule(device: torch.device) -> Rule:
    """Sequential offload: leaf by leaf, each loaded when it is called."""
    return Rule(Level.LEAF, resting_tier(device), prefetch=0)


def model_rule(device: torch.device) -> Rule:
    """Model offload: the whole module, for as long as it is in use."""
    return Rule(Level.WHOLE, resting_tier(device), prefetch=0)


def named_rule(name: str, device: torch.device) -> Rule:
    """The rule called "model", "block", "leaf" (these two load one unit ahead) or "sequential", from the most memory
    to the least; raises `ValueError` for other names.
    """
    rules = {
        "model": model_rule(device),
        "block": Rule(Level.BLOCK, resting_tier(device)),
        "leaf": Rule(Level.LEAF, resting_tier(device)),
        "sequential": sequential_rule(device),
    }
    if name not in rules:
        raise ValueError(f"offload={name!r} is not possible: it is one of {', '.join(rules)}, or None.")
    return rules[name]


def group_rule(
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
) -> tuple[torch.device, Rule]:
    """The device and the rule that these arguments of group offload mean; see `lowtide.hooks.apply_group_offloading`.

    Raises `ValueError` for values that are not possible.
    """
    if offload_type not in OFFLOAD_TYPES:
        raise ValueError(f"offload_type={offload_type!r} is not possible: it is one of {', '.join(OFFLOAD_TYPES)}.")
    if torch.device(offload_device).type != "cpu":
        raise ValueError(
            f"offload_device={str(offload_device)!r} is not possible: weights rest in host memory ('cpu'), or on disk "
            "with offload_to_disk_path."
        )
    if record_stream or non_blocking:
        named = [name for name, on in (("record_stream", record_stream), ("non_blocking", non_blocking)) if on]
        warnings.warn(f"{' and '.join(named)} have no effect: copies never block and use events.", stacklevel=4)
    device = execution_device(onload_device)
    to_disk = offload_to_disk_path is not None
    rule = Rule(
        OFFLOAD_TYPES[offload_type],
        Tier.DISK if to_disk else resting_tier(device),
        blocks_per_group=1 if num_blocks_per_group is None else num_blocks_per_group,
        prefetch=int(use_stream),
        spill=to_disk,
        spill_folder=offload_to_disk_path,
        pin=use_stream and not low_cpu_mem_usage,
        block_modules=None if block_modules is None else tuple(block_modules),
    )
    return device, rule


def apply_residency(
    module: nn.Module,
    resident_bytes: int | str = 0,
    *,
    prefetch: int = 1,
    prefetch_bytes: int | str | None = None,
    rest: Tier | str | None = None,
    level: Level | str = Level.BLOCK,
    blocks_per_group: int = 1,
    device: torch.device | str | None = None,
    host_bytes: int | str | None = None,
    spill_folder: str | None = None,
    block_modules: Collection[str] | None = None,
    weights: CheckpointIndex | None = None,
) -> Attachment:
    """Keep `resident_bytes` of any module's weights on the device and stream the others through it.

    The resident blocks are spread evenly, so that copies hide behind computing. `rest` is where the others rest: on
    the "host" (default beside a GPU) or on "disk" (default without one), there in the checkpoint they came from;
    weights that are in no file are written to an unnamed one in `spill_folder`. `host_bytes` limits what rests on the
    host: what does not fit rests on disk. Sizes are bytes or text such as "2GB". `prefetch` units are loaded ahead, or
    with `prefetch_bytes` as many as find room in so many bytes together with those in use.
    A module on meta needs the index of its `weights`. Peak weight bytes: `Attachment.bound`. The results are those of
    the resident module, bit for bit; `lowtide.memory.detach(module)` undoes it.
    Raises `ValueError` for settings and modules that are not possible, `OSError` and `CheckpointError` for files.
    """
    chosen = execution_device(device)
    rule = Rule(
        _level(level),
        resting_tier(chosen, rest),
        blocks_per_group=blocks_per_group,
        prefetch=prefetch,
        prefetch_bytes=None if prefetch_bytes is None else _bytes(prefetch_bytes),
        resident_bytes=_bytes(resident_bytes),
        host_bytes=None if host_bytes is None else _bytes(host_bytes),
        spill=rest == Tier.DISK or spill_folder is not None,
        spill_folder=spill_folder,
        block_modules=None if block_modules is None else tuple(block_modules),
    )
    return attach(module, rule, stream_for(chosen, rule), index=weights)


def attach_all(
    modules: Mapping[str, nn.Module], rule: Rule, device: torch.device, **options: Any
) -> dict[str, Attachment]:
    """Put several modules that do not run at the same time under one rule and one stream; all of them or none."""
    stream = stream_for(device, rule)
    begun: list[nn.Module] = []
    done: dict[str, Attachment] = {}
    try:
        for name, module in modules.items():
            begun.append(module)
            done[name] = attach(module, rule, stream, **options)
    except BaseException:
        for module in begun:
            detach(module)
        raise
    return done


def _level(level: Level | str) -> Level:
    if level not in list(Level):
        raise ValueError(f"level={level!r} is not possible: it is one of {', '.join(Level)}.")
    return Level(level)


def _bytes(size: int | str) -> int:
    return parse_bytes(size) if isinstance(size, str) else size
