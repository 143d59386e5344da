"""Hooks of other libraries on a guest's networks: those that move or cast weights themselves are refused by name.

Under a plan nothing else moves weights. Hooks that look at what goes through a network, or change it, may stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

ACCELERATE, PEER = "_hf_hook", "_diffusers_hook"
"""The attributes under which accelerate and diffusers keep their hooks in a module."""
_OFFLOADED = "call pipe.remove_all_hooks() first"
_ANEW = "which diffusers cannot undo: load {name} anew without it"
_INSTEAD: dict[str, tuple[str, str]] = {
    "CpuOffload": ("enable_model_cpu_offload", _OFFLOADED),
    "AlignDevicesHook": ("enable_sequential_cpu_offload, or a device map,", _OFFLOADED),
    "LayerwiseCastingHook": ("accelerate's layerwise casting", _OFFLOADED),
    "group_offloading": ("enable_group_offload", _ANEW),
    "layerwise_casting": ("enable_layerwise_casting", _ANEW + ", and allow a plan 8 bits: allow=('fp8',)"),
}
"""For each hook what puts it on, and what to do."""


def check_moved_by_none(name: str, network: nn.Module) -> None:
    """Raise `ValueError`, saying what to do, for a network whose weights hooks of another library move or cast.

    And for a cache that asks the pipeline itself for its step, while on meta another one runs.
    """
    for kind in _moving(network):
        how, what = _INSTEAD[kind]
        raise ValueError(
            f"{name} is under {how} already, and a budget says itself where weights rest: {what.format(name=name)}."
        )
    _check_cache(name, network)


def _moving(network: nn.Module) -> Iterator[str]:
    for module in network.modules():
        for hook in _of_accelerate(module.__dict__.get(ACCELERATE)):
            kind = type(hook).__name__
            if kind in _INSTEAD and getattr(hook, "offload", True):
                yield kind
        yield from (kind for kind in getattr(module.__dict__.get(PEER), "hooks", ()) if kind in _INSTEAD)


def _of_accelerate(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())


def _check_cache(name: str, network: Any) -> None:
    cache = getattr(network, "_cache_config", None)
    about = {} if cache is None else vars(cache)
    asking = [field for field, value in about.items() if field.endswith("timestep_callback") and value is not None]
    if asking:
        raise ValueError(
            f"{name} has a {type(cache).__name__}, whose {asking[0]} asks this pipeline for its step, so what a call "
            f"takes cannot be foreseen: call pipe.{name}.disable_cache() first."
        )
