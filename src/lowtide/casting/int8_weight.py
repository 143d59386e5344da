"""A weight in 8 bits by which its layer multiplies as it is; see `lowtide.ops.int8_products`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowtide.casting.lazily_packed import LazilyPacked, geometry_of
from lowtide.ops.int8_products import (
    COMPUTED,
    has_int8_products,
    int8_convolution,
    int8_product,
    pack_int8_convolution,
    pack_int8_product,
)


class Int8Weight(LazilyPacked):
    """The weight of one layer. On another device, in another dtype and without the instructions it is dequantized."""

    @property
    def is_dequantized(self) -> bool:
        """Whether its numbers are made around the calls of its layer."""
        return not self.can_multiply()

    def can_multiply(self) -> bool:
        """Whether this processor multiplies by it."""
        return self.device.type == "cpu" and self.dtype in COMPUTED and has_int8_products()

    def pack(self, numbers: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The 8-bit numbers in oneDNN's order."""
        if isinstance(layer, nn.Conv2d):
            return pack_int8_convolution(numbers.contiguous(), geometry_of(layer), x.shape)
        return pack_int8_product(numbers.contiguous(), x.numel() // x.shape[-1])

    @staticmethod
    def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The 8-bit numbers; those of a product lie the other way round in oneDNN's order."""
        numbers = packed.to_dense()
        return numbers.t() if len(shape) == 2 else numbers

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, layer: Any) -> torch.Tensor:
        """What the layer makes of an input, which is rounded too."""
        assert self.scale is not None
        if isinstance(layer, nn.Conv2d):
            return int8_convolution(x, packed, self.scale.flatten(), layer.bias, geometry_of(layer))
        return int8_product(x, packed, self.scale.flatten(), layer.bias)
