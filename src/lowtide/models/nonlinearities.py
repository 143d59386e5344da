"""The functions between the linear layers of text and picture encoders, by the names that configurations use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Nonlinearity = Callable[[torch.Tensor], torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by a logistic function (Hendrycks & Gimpel 2016, sec. 2), as CLIP was trained with."""
    return x * (1.702 * x).sigmoid_()


def gelu_by_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by a hyperbolic tangent (Hendrycks & Gimpel 2016, sec. 2), rounded after each operation, as in T5 1.1."""
    inner = (x + 0.044715 * x.pow(3)).mul_(math.sqrt(2 / math.pi)).tanh_()
    return 0.5 * x * (1 + inner)


def gelu_by_tanh_at_once(x: torch.Tensor) -> torch.Tensor:
    """The same in one operation of PyTorch, which rounds once."""
    return F.gelu(x, approximate="tanh")


NONLINEARITIES: dict[str, Nonlinearity] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": gelu_by_tanh,
    "gelu_pytorch_tanh": gelu_by_tanh_at_once,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
