"""Weights for a module that was built on meta: read now, or left where they are until they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lowtide.memory.attach import attach
from lowtide.memory.forms import Rule
from lowtide.memory.presets import execution_device, named_rule, stream_for
from lowtide.memory.stream import Stream
from lowtide.weights.fill import fill
from lowtide.weights.index import CheckpointIndex


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
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Give a module on meta the weights of `index`: as `fill` does, or at rest under a rule, with nothing read.

    Raises as `fill` and `attach` do, also of weights that do not match.
    """
    if offload is None:
        fill(module, index, dtype=dtype, buffers=buffers)
        return
    fill(module, index, dtype=dtype, device="meta", buffers=buffers)
    attach(module, offload.rule, offload.stream, index=index)
