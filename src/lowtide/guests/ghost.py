"""A copy of a foreign pipeline whose networks are on meta: its own call goes through it, and nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowtide.guests.copied_hooks import through_own_hooks
from lowtide.guests.networks import components_of, is_pipeline, networks_of
from lowtide.guests.quantized import with_plain_linears
from lowtide.prediction.absent_numbers import on_meta
from lowtide.prediction.meta_copy import meta_copy

_CPU = torch.device("cpu")


def ghost_of(pipe: Any) -> Any:
    """The copy. It says that it computes on the CPU, so that all that is small and real stays there."""
    networks = networks_of(pipe).values()
    copies = {id(network): _on_meta(network) for network in networks}
    return _ghost(pipe, copies, {})


def _on_meta(network: nn.Module) -> nn.Module:
    return with_plain_linears(through_own_hooks(meta_copy(network)), network, _dtype(network))


def _ghost(pipe: Any, copies: Mapping[int, nn.Module], ghosts: dict[int, Any]) -> Any:
    if id(pipe) in ghosts:
        return ghosts[id(pipe)]
    twin = copy.copy(pipe)
    ghosts[id(pipe)] = twin
    if hasattr(pipe, "set_progress_bar_config"):
        twin.__dict__["_progress_bar_config"] = {"disable": True}
    twin.__class__ = as_subclass(type(pipe), _execution_device=_always(_CPU), device=_always(_CPU))
    for name, part in {**components_of(pipe), **vars(pipe)}.items():
        if id(part) in copies:
            twin.__dict__[name] = copies[id(part)]
        elif is_pipeline(part):
            twin.__dict__[name] = _ghost(part, copies, ghosts)
        elif hasattr(part, "set_timesteps"):
            twin.__dict__[name] = copy.deepcopy(part)
    return twin


def _dtype(network: Any) -> torch.dtype:
    """The dtype that a network computes in."""
    own = getattr(network, "dtype", None)
    return own if isinstance(own, torch.dtype) and own.is_floating_point else torch.float32


def as_subclass(cls: type[Any], **members: Any) -> type[Any]:
    """A class of the same name with other members: for one object, whose own class stays as it is."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **members})


def _always(value: Any) -> property:
    return property(lambda self: value)


def harmless(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that is only followed: no callbacks, other generators, tensors of other devices on meta."""
    return {name: _harmless(value) for name, value in arguments.items() if not _is_callback(name, value)}


def _is_callback(name: str, value: Any) -> bool:
    return "callback" in name and callable(value)


def _harmless(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(0)
    if isinstance(value, torch.Tensor):
        return value.clone() if value.device.type == "cpu" and value.numel() < 2**16 else on_meta(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_harmless(item) for item in value)
    return value
