"""Give a module on meta its weights: read them now, or leave them at rest until they are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.cast_files import computing_dtype, place, resting_state, saved_weights
from lowtide.casting.casting import Casting
from lowtide.memory.attach import attach
from lowtide.memory.presets import execution_device, named_rule, stream_for
from lowtide.memory.rule import Rule
from lowtide.memory.stream import Stream
from lowtide.weights.fill import dtype_name, fill
from lowtide.weights.index import CheckpointIndex

__all__ = ["Offload", "offload_named", "put_weights", "resting_state"]


@dataclass(frozen=True)
class Offload:
    """The rule that modules get while they are loaded, and the stream they share."""

    rule: Rule
    stream: Stream


def offload_named(name: str | None, device: torch.device | str | None = None) -> Offload | None:
    """The offload called `name` (see `named_rule`) on `device`, None for None; raises `ValueError` for others."""
    if name is None:
        return None
    chosen = execution_device(device)
    rule = named_rule(name, chosen)
    return Offload(rule, stream_for(chosen, rule))


def put_weights(
    module: nn.Module,
    index: CheckpointIndex,
    *,
    dtype: torch.dtype | None,
    offload: Offload | None = None,
    casting: Casting | None = None,
    never_cast: Collection[str] = (),
    float32_beside_float16: Collection[str] = (),
    own_dtypes: Mapping[str, torch.dtype] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    leave: Collection[str] = (),
) -> None:
    """Give a module on meta the weights of `index`: read as `fill` reads them or, under an `offload`, left at rest.

    Weights that are in 8 bits in the file stay so, and multiply as `casting` says. With `casting` the others are cast
    one by one from the file, except in modules that match a pattern of `never_cast`; all compute in one dtype. If that
    is float16, weights that match a pattern (`fnmatch`) of `float32_beside_float16` are float32, or compute in float32
    where they rest in 8 bits; `own_dtypes` gives other dtypes by pattern, whatever the others compute in. What is in
    slots named in `leave` stays. Raises as `fill`, `attach` and `cast` do.
    """
    saved, others = saved_weights(module, index)
    asked = dtype if casting is None or casting.compute is None else getattr(torch, casting.compute)
    in_file = computing_dtype(others, float32_beside_float16)
    is_float16 = (asked or in_file) == torch.float16
    own = {**dict.fromkeys(float32_beside_float16 if is_float16 else (), torch.float32), **(own_dtypes or {})}
    if offload is not None and casting is None and not saved:
        fill(module, index, dtype=dtype, device="meta", own_dtypes=own, buffers=buffers, leave=leave)
        attach(module, offload.rule, offload.stream, index=index)
        return
    compute = dtype or (in_file if saved else None)
    placed = [slot.name for weight in saved for slot in weight.slots]
    keep = () if casting is None else ("*",)  # they stay views of the file: casting converts them
    fill(module, others, dtype=compute, buffers=buffers, keep_dtype=keep, own_dtypes=own, leave=[*placed, *leave])
    if saved:
        in_int8 = casting is not None and casting.int8_matmul
        place(module, saved, compute or torch.float32, own, int8_matmul=in_int8)
    if casting is not None:
        target = casting.compute or (None if compute is None else dtype_name(compute))
        as_saved = (f"^{re.escape(name.rpartition('.')[0])}$" for name in placed)  # already in 8 bits
        patterns = (*casting.sparing(never_cast).skip_patterns, *as_saved)
        apply_casting(module, replace(casting, compute=target, skip_patterns=patterns), own)
    if offload is not None:
        attach(module, offload.rule, offload.stream)
