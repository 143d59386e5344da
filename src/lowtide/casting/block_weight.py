"""Weights that rest in blocks of 32 numbers with one scale each: int4, and the same layouts in GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowtide.casting.cast_weight import CastWeight, resting
from lowtide.memory.store import HostRest, Rest
from lowtide.memory.weight import View, Weight
from lowtide.ops.block_layout import BlockLayout
from lowtide.ops.block_quantization import dequantize_blocks, quantize_blocks
from lowtide.ops.modes import outside_inference_mode


class BlockWeight(CastWeight):
    """One floating-point parameter whose bytes at `rest` are blocks of the given `layout`.

    They are in the order of the dimensions, also where the parameter has its channels last while it works.
    """

    def __init__(self, views: Sequence[View], rest: Rest, device: torch.device, layout: BlockLayout) -> None:
        super().__init__(views, rest, device, torch.uint8)
        self.layout = layout
        self.nbytes = layout.size(self.form.shape)

    @classmethod
    def in_blocks(
        cls, weight: Weight, numbers: torch.Tensor, layout: BlockLayout, compute: torch.dtype | None
    ) -> BlockWeight:
        """Quantize `numbers`, those of `weight`, which compute in `compute` (None: in the dtype they have)."""
        dtype = compute or numbers.dtype
        views = [replace(view.without_given(), offset=0, dtype=dtype) for view in weight.views]
        made = cls(views, HostRest(torch.empty(0)), weight.given, layout)
        made._quantize(numbers)
        return made

    def _quantize(self, numbers: torch.Tensor, *, scaled: bool = True) -> None:
        dtype = None if numbers.dtype == self.dtype else self.dtype
        try:
            with outside_inference_mode(), torch.no_grad():
                self.rest = resting(quantize_blocks(_in_rows(numbers), self.layout, dtype))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def working_bytes(self) -> int:
        """Bytes of its numbers while they work."""
        return torch.Size(self.form.shape).numel() * self.dtype.itemsize

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(self.layout.shape(self.form.shape))

    def _fill(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        dequantize_blocks(values, _in_rows(out))
        return out

    def rows(self, view: View, indices: torch.Tensor, *options: Any) -> torch.Tensor:
        """The rows of an embedding that `indices` name; only these are dequantized."""
        blocks = self.values()
        chosen = torch.embedding(blocks.view(torch.int8).flatten(1), indices, *options).view(torch.uint8)
        out = torch.empty((indices.numel(), *view.shape[1:]), dtype=view.dtype, device=blocks.device)
        dequantize_blocks(chosen.view(len(out), *blocks.shape[1:]), out)
        return out.view(*indices.shape, *view.shape[1:])

    def _reorder(self, stride: tuple[int, ...]) -> None:
        """Nothing: blocks keep the order of the dimensions."""


def _in_rows(numbers: torch.Tensor) -> torch.Tensor:
    return numbers if numbers.dim() > 1 else numbers[None]
