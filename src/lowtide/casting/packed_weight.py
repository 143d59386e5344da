"""A weight in the order of numbers in which a CPU's kernels multiply, brought to it once and not in each call.

See `lowtide.ops.packed`. A weight is packed in its layer's first call, for inputs of that size, and takes as many bytes
as the numbers in the layer's dtype. They are all there, so that nothing is lost; results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.casting.lazily_packed import LazilyPacked, flat_bytes, geometry_of
from lowtide.memory.store import DiskRest, HostRest
from lowtide.memory.weight import View, Weight, became
from lowtide.ops.packed import has_packed, pack_convolution, pack_product, packed_convolution, packed_product


class PackedWeight(LazilyPacked):
    """The weight of one layer. Until it is `packed`, and where a file has its numbers, it rests as it did before."""

    loses = False

    def __init__(self, weight: Weight, on_disk: DiskRest | None, compute: torch.dtype | None) -> None:
        view = weight.views[0]
        dtype = compute or view.dtype
        views = [replace(each.without_given(), offset=0, dtype=dtype) for each in weight.views]
        super().__init__(views, on_disk or weight.rest, weight.given, dtype)
        self.nbytes *= dtype.itemsize
        if on_disk is not None:
            self.keep_original(on_disk, view)
        if self.original is not None:
            self.rest = self.original
        elif dtype != view.dtype:
            self.rest = HostRest(flat_bytes(view.of(weight.flat_on_host()).detach(), self.form, dtype))

    @property
    def working_bytes(self) -> int:
        """Bytes of its numbers while they work."""
        return self.nbytes

    @property
    def is_dequantized(self) -> bool:
        """Never: its numbers are all there."""
        return False

    # ---- its layer's calls

    def can_multiply(self) -> bool:
        """Whether oneDNN has kernels for its dtype."""
        return has_packed(self.dtype)

    def pack(self, numbers: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The numbers in oneDNN's order."""
        if isinstance(layer, nn.Conv2d):
            return pack_convolution(numbers, geometry_of(layer), x.shape)
        return pack_product(numbers, x.numel() // x.shape[-1])

    @staticmethod
    def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The numbers, from those in oneDNN's order."""
        return packed.to_dense()

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, layer: Any) -> torch.Tensor:
        """What the layer makes of an input."""
        if isinstance(layer, nn.Conv2d):
            return packed_convolution(x, packed, layer.bias, geometry_of(layer))
        return packed_product(x, packed, layer.bias)

    # ---- where it is

    def keep_numbers(self, flat: torch.Tensor, view: View) -> None:
        """Rest as these bytes, seen as by `view`, until it is packed anew."""
        self.rest, self.original = HostRest(flat), None
        self.storage, self.nbytes, self.form = view.dtype, flat.numel(), view
        self.views = [replace(each, stride=view.stride, dtype=view.dtype) for each in self.views]

    def take(self, numbers: torch.Tensor) -> None:
        """Rest as these numbers from now on."""
        self.keep_numbers(flat_bytes(numbers.detach(), self.form, self.form.dtype), self.form)

    def follow(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Become what `fn`, given to `Module._apply`, makes of such a tensor: another dtype or memory format.

        Raises `ValueError` for another device, which has no such numbers.
        """
        now = became(self.form, self.device, fn)
        if now.device.type != "cpu":
            raise ValueError(f"{self.name} is packed for a CPU, and cannot go to {now.device} before lowtide.unfit.")
        if (now.dtype, now.stride) == (self.dtype, self.form.stride):
            return
        plain = Weight(self.views, self.nbytes, self.rest, self.given)
        if plain.can_follow:
            plain.follow(fn)
            self.rest, self.views, self.nbytes = plain.rest, plain.views, plain.nbytes
            self.form, self.storage = self.views[0], self.views[0].dtype
            self.original = self.rest
        else:
            view = replace(self.form, stride=now.stride, dtype=now.dtype)
            self.keep_numbers(flat_bytes(self.values(), view, view.dtype), view)
        self._placeholders = {}
        self.lay_down()

    def dequantize_into(self, flat: torch.Tensor) -> None:
        """Fill flat bytes with the numbers."""
        flat.copy_(self._dequantized(self.values()))

    def _dequantized(self, values: torch.Tensor) -> torch.Tensor:
        return flat_bytes(values, self.form, self.form.dtype)
