"""Tracing while weights come and go is refused: a trace would keep for ever what is in the slots at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback


def refuse_tracing(module: nn.Module) -> None:
    """Raise `RuntimeError` if this call is being traced, exported or compiled.

    `torch.compile` without `fullgraph` goes on, and compiles what is inside the layers that weights come to.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_compiling():
        raise RuntimeError(
            f"{type(module).__name__} cannot be traced, exported or compiled as a whole now: its weights come when "
            "they are called, so the trace would keep those of this moment. Undo that first (disable_group_offload, "
            "disable_sequential_cpu_offload, disable_layerwise_casting, or lowtide.memory.detach), then trace it."
        )


class Uncompiled:
    """A function that `torch.compile` leaves alone. Where nothing is being compiled that costs next to nothing: the
    compiler is asked to only inside of a compiled call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._left_alone: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        is_compiled = torch.compiler.is_compiling() or get_eval_frame_callback() is not None  # traced itself, or run
        if not is_compiled:
            return self._function(*args, **kwargs)
        if self._left_alone is None:
            self._left_alone = torch.compiler.disable(self._function)
        return self._left_alone(*args, **kwargs)
