"""Hooks of diffusers on the copy of a network: it goes through its own, not through those of the network it is of."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lowtide.guests.moving_hooks import PEER


def through_own_hooks(twin: nn.Module) -> nn.Module:
    """The twin, a deep copy, with its own hooks linked.

    A module with such hooks has a `forward` that is a function with the hooks in its closure, and copies share those:
    what a cache keeps of one network would be read by the other. The hooks themselves were copied with the module.
    """
    for module in twin.modules():
        registry = module.__dict__.get(PEER)
        inner: Any = None
        for hook in getattr(registry, "_fn_refs", ()):
            if inner is not None:
                setattr(hook, "forward" if hook.original_forward is None else "original_forward", inner)
            inner = functools.partial(_through, hook, module)
        if inner is not None:
            module.__dict__["forward"] = inner
    return twin


def _through(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, hook.forward(*args, **kwargs))
