"""A slower link and slower computing than a machine has: the same work is done again, so that ratios are another's.

What is simulated is the time of copies from the host and of linear layers, and how both run beside each other; not
another device's memory, its kernels, or its launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SMALL = 2**16
"""Bytes below which a copy is left alone: its time is not the link's."""


@contextmanager
def slower_link(device: torch.device, ratio: float) -> Generator[None]:
    """Have every large copy from the host to a device take `ratio` times as long, whoever asks for it.

    It is made again right behind itself, on its stream, in whole and in part.
    """
    copy, to = torch.Tensor.copy_, torch.Tensor.to

    def again(target: torch.Tensor, source: torch.Tensor) -> None:
        crosses = source.device.type == "cpu" and target.device.type == device.type
        if not crosses or target.numel() * target.itemsize < SMALL:
            return
        whole, part = divmod(ratio - 1, 1)
        for _ in range(int(whole)):
            copy(target, source, non_blocking=True)
        rows = int(part * len(target))
        if rows:
            copy(target[:rows], source[:rows], non_blocking=True)

    def slow_copy(self: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        done = copy(self, source, *args, **kwargs)
        again(self, source)
        return done

    def slow_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = to(self, *args, **kwargs)
        if made is not self:
            again(made, self)
        return made

    try:
        torch.Tensor.copy_, torch.Tensor.to = slow_copy, slow_to  # type: ignore[method-assign,assignment]
        yield
    finally:
        torch.Tensor.copy_, torch.Tensor.to = copy, to  # type: ignore[method-assign]


def repeat_products(module: nn.Module, ratio: float) -> None:
    """Have all linear layers compute `ratio` times: some of them once more than the others, spread evenly.

    Undone by `ratio` 1. It is the layers' own `forward` that is replaced, inside whatever brings their weights.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for place, layer in enumerate(layers):
        layer.__dict__.pop("forward", None)
        times = math.floor((place + 1) * ratio) - math.floor(place * ratio)
        if times > 1:
            layer.forward = repeated(layer.forward, times)  # type: ignore[method-assign]


def repeated(forward: Callable[..., Any], times: int) -> Callable[..., Any]:
    def many(*args: Any, **kwargs: Any) -> Any:
        for _ in range(times - 1):
            forward(*args, **kwargs)
        return forward(*args, **kwargs)

    return many


def ratio_for(seconds: float, measure: Callable[[float], float], most: float = 100.0) -> float:
    """How often layers must compute for a step to take `seconds`: the time of a step is linear in it."""
    once, twice = measure(1.0), measure(2.0)
    return min(max(1.0, 1.0 + (seconds - once) / max(twice - once, 1e-9)), most)
