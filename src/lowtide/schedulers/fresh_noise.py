"""Noise that schedulers draw: the same on every device from a generator on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowtide.machine.accelerators import brought_to

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int], *, generator: Generators, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise of `shape`, drawn where the generator is: a CPU generator gives the same noise everywhere.

    Each generator of a list draws one item of the batch; raises `ValueError` if their number is not `shape[0]`.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators were given for a batch of {shape[0]}: give one for each item."
            )
        items = [draw_noise((1, *shape[1:]), generator=g, device=device, dtype=dtype) for g in generator]
        return torch.cat(items)
    source = generator.device if generator is not None else device
    noise = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    return brought_to(torch.device(device), noise)
