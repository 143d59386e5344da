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

from lowtide.casting.cast_weight import CastWeight, small_of
from lowtide.casting.only_products import only_multiplies
from lowtide.forks import new_lock
from lowtide.memory.rule import Tier
from lowtide.memory.store import DiskRest, HostRest
from lowtide.memory.weight import View, Weight, became
from lowtide.ops.modes import outside_inference_mode
from lowtide.ops.packed import (
    Geometry,
    has_packed,
    pack_convolution,
    pack_product,
    packed_convolution,
    packed_product,
)
from lowtide.weights.provenance import let_go_of_file

Forward = Callable[[torch.Tensor], torch.Tensor]


class PackedWeight(CastWeight):
    """The weight of one layer. Until it is `packed`, and where a file has its numbers, it rests as it did before."""

    loses = False

    def __init__(self, weight: Weight, on_disk: DiskRest | None, compute: torch.dtype | None) -> None:
        view = weight.views[0]
        dtype = compute or view.dtype
        views = [replace(each.without_given(), offset=0, dtype=dtype) for each in weight.views]
        super().__init__(views, on_disk or weight.rest, weight.given, dtype)
        self.nbytes *= dtype.itemsize
        self.multiplies = True
        self.packed: torch.Tensor | None = None
        self._packing = new_lock()
        if on_disk is not None:
            self.keep_original(on_disk, view)
        if self.original is not None:
            self.rest = self.original
        elif dtype != view.dtype:
            self.rest = HostRest(_flat(view.of(weight.flat_on_host()).detach(), self.form))

    @property
    def working_bytes(self) -> int:
        """Bytes of its numbers while they work."""
        return self.nbytes

    @property
    def is_dequantized(self) -> bool:
        """Never: its numbers are all there."""
        return False

    # ---- its layer's calls

    def forward_of(self, layer: nn.Module) -> Forward:
        """The `forward` of a layer that multiplies by the packed numbers."""
        own = type(layer).forward
        multiply = _multiplier(layer)

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight: Any = layer.weight
            has_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            is_usual = x.dtype == self.dtype and x.device.type == "cpu" and not has_gradient
            if not is_usual or small_of(weight) is not self or not has_packed(self.dtype):
                return own(layer, x)
            return multiply(x, self.packed_for(layer, x))

        return forward

    def packed_for(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The packed numbers, made for inputs like `x` where there are none yet."""
        if self.packed is None:
            with self._packing:
                return self._pack(layer, x) if self.packed is None else self.packed
        return self.packed

    def _pack(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        numbers = self.values()
        with outside_inference_mode(), torch.no_grad():
            if isinstance(layer, nn.Conv2d):
                packed = pack_convolution(numbers, _geometry(layer), x.shape)
            else:
                packed = pack_product(numbers, x.numel() // x.shape[-1])
        if self.rest.tier is Tier.HOST:
            self.rest = PackedRest(packed, self.form)
        else:
            let_go_of_file(numbers)
        self.packed = packed
        return packed

    # ---- where it is

    def keep_numbers(self, flat: torch.Tensor, view: View) -> None:
        """Rest as these bytes, seen as by `view`, until it is packed anew."""
        self.rest, self.original, self.packed = HostRest(flat), None, None
        self.storage, self.nbytes, self.form = view.dtype, flat.numel(), view
        self.views = [replace(each, stride=view.stride, dtype=view.dtype) for each in self.views]

    def take(self, numbers: torch.Tensor) -> None:
        """Rest as these numbers from now on."""
        self.keep_numbers(_flat(numbers.detach(), self.form), self.form)

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
            self.form, self.storage, self.packed = self.views[0], self.views[0].dtype, None
            self.original = self.rest
        else:
            view = replace(self.form, stride=now.stride, dtype=now.dtype)
            self.keep_numbers(_flat(self.values(), view), view)
        self._placeholders = {}
        self.lay_down()

    def dequantize_into(self, flat: torch.Tensor) -> None:
        """Fill flat bytes with the numbers."""
        flat.copy_(self._dequantized(self.values()))

    def _dequantized(self, values: torch.Tensor) -> torch.Tensor:
        return _flat(values, self.form)


class PackedRest:
    """Bytes in host memory that are there as packed numbers alone."""

    tier = Tier.HOST
    works_in_place = False
    origin = None

    def __init__(self, packed: torch.Tensor, form: View) -> None:
        self._packed, self._form = packed, form

    def on_host(self) -> torch.Tensor:
        """The numbers in their usual order, as a copy."""
        return _flat(self._packed.to_dense(), self._form)

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor with the bytes from `start` on."""
        target.copy_(self.on_host()[start : start + target.numel()])


def can_pack(weight: Weight) -> bool:
    """Whether a weight is that of one convolution or product on a CPU, whose layer does nothing else with it."""
    view = weight.views[0]
    layer, is_alone = view.slot.owner, len(weight.views) == 1 and len(view.shape) > 1
    if not is_alone or weight.given.type not in ("cpu", "meta") or "forward" in vars(layer):
        return False
    if isinstance(layer, nn.Conv2d):
        is_usual = layer.padding_mode == "zeros" and layer.groups == 1 and not isinstance(layer.padding, str)
        return is_usual and type(layer).forward is nn.Conv2d.forward
    return only_multiplies(layer)


def _multiplier(layer: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def convolve(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return packed_convolution(x, packed, layer.bias, _geometry(layer))  # type: ignore[arg-type]

    def multiply(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return packed_product(x, packed, layer.bias)  # type: ignore[arg-type]

    return convolve if isinstance(layer, nn.Conv2d) else multiply


def _geometry(layer: Any) -> Geometry:
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _flat(numbers: torch.Tensor, form: View) -> torch.Tensor:
    with outside_inference_mode():
        ordered = torch.empty_strided(form.shape, form.stride, dtype=form.dtype)
        return ordered.copy_(numbers).as_strided((ordered.numel(),), (1,)).view(torch.uint8)
