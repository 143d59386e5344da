"""The offloads of the document, for all networks of a pipeline at once: each is a rule."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lowtide.memory.attach import detach
from lowtide.memory.presets import attach_all
from lowtide.memory.rule import Rule
from lowtide.memory.rule_changes import in_turn
from lowtide.memory.stream import Stream


def offload(
    modules: Mapping[str, nn.Module], rule: Rule, device: torch.device, excluded: str | Sequence[str] | None = None
) -> None:
    """Put networks under one rule; those `excluded` by name stay on `device`.

    Raises `ValueError` for names that are none of theirs, before anything is changed.
    """
    staying = [excluded] if isinstance(excluded, str) else list(excluded or ())
    unknown = sorted(set(staying) - set(modules))
    if unknown:
        raise ValueError(f"exclude_modules={unknown} are no components; there are {', '.join(modules)}.")
    attach_all({name: module for name, module in modules.items() if name not in staying}, rule, device)
    for name in staying:
        detach(modules[name])
        modules[name].to(device)


def end_offload(modules: Mapping[str, nn.Module]) -> None:
    """Undo any offload of networks: their weights are where they were before."""
    for module in modules.values():
        detach(module)


@contextmanager
def held(streams: Iterable[Stream]) -> Generator[None]:
    """While this lasts, whole networks stay loaded after their calls until another one needs the room.

    Other threads wait, also those that call another pipeline of the same networks.
    """
    with _held(in_turn(streams)):
        yield


@contextmanager
def _held(streams: Sequence[Stream]) -> Generator[None]:
    if not streams:
        yield
        return
    with streams[0].held(), _held(streams[1:]):
        yield
