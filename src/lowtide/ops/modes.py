"""PyTorch's modes: asked for, and turned off and on again by single calls of C++.

The ends of `torch.inference_mode` and `torch.no_grad` are Python code: where an interrupt comes into one, gradients
stay off in that thread for good, since nobody else turns them on.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


def outside_inference_mode() -> Any:
    """Bracket what makes tensors that must serve in every mode, whatever mode the caller is in."""
    return torch._C._InferenceMode(False)


@contextmanager
def without_gradients() -> Generator[None]:
    """Bracket what needs no gradients."""
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        yield
    finally:
        torch._C._set_grad_enabled(before)


def take_gradients(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass through an operation on these tensors may come."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_traced() -> bool:
    """Whether `torch.jit` records what is computed now."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
