"""Refuse tracing while weights come and go: a trace would keep the weights of that moment for ever."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def refuse_tracing(module: nn.Module) -> None:
    """Raise `RuntimeError` if this call is being traced, exported or compiled.

    `torch.compile` without `fullgraph` goes on: it compiles the code inside each layer.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__} cannot be traced, exported or compiled as a whole now: its weights come when "
            "they are called, so the trace would keep those of this moment. Undo that first (disable_group_offload, "
            "disable_sequential_cpu_offload, disable_layerwise_casting, or lowtide.memory.detach), then trace it."
        )


class Uncompiled:
    """A function that `torch.compile` leaves alone. The compiler is not imported for that: it takes a second."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._left_alone: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if self._left_alone is None and "torch._dynamo" in sys.modules:
            self._left_alone = torch.compiler.disable(self._function)
        return (self._left_alone or self._function)(*args, **kwargs)
