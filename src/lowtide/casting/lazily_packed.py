"""Weights that are brought once to the order of numbers in which a CPU's kernels multiply: in their layer's first call.

See `lowtide.ops.packed` and `lowtide.ops.int8_products`. What rested before is given back to the system then, but where
a file has it, and is made of the packed numbers where somebody asks: every number is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lowtide.casting.cast_weight import CastWeight, small_of
from lowtide.casting.only_products import only_multiplies
from lowtide.forks import new_lock
from lowtide.machine.heap import trim_heap
from lowtide.memory.rule import Tier
from lowtide.memory.store import HostRest, Rest
from lowtide.memory.weight import View, Weight
from lowtide.ops.modes import outside_inference_mode, take_gradients
from lowtide.ops.packed import Geometry
from lowtide.weights.provenance import let_go_of_file


class LazilyPacked(CastWeight):
    """The weight of one layer, which rests as it did before until it is `packed`.

    Under another rule nothing stays packed: the bytes that have come are packed for each call.
    """

    def __init__(self, views: Sequence[View], rest: Rest, device: torch.device, storage: torch.dtype) -> None:
        super().__init__(views, rest, device, storage)
        self.multiplies = True
        self._made: tuple[Rest, torch.Tensor] | None = None
        """Packed numbers, and the resting bytes that have the same numbers."""
        self._packing = new_lock()

    def can_multiply(self) -> bool:
        """Whether kernels take packed numbers for the dtype in which it computes."""
        raise NotImplementedError

    def pack(self, numbers: torch.Tensor, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The resting numbers in the kernels' order, for inputs like `x`."""
        raise NotImplementedError

    @staticmethod
    def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The resting numbers, from those in the kernels' order."""
        raise NotImplementedError

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """What the layer makes of an input."""
        raise NotImplementedError

    @property
    def packed(self) -> torch.Tensor | None:
        """The numbers in the kernels' order, once they are made."""
        return self._made[1] if self._made is not None and self._made[0] is self.rest else None

    def forward_of(self, layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """The `forward` of a layer that multiplies by the packed numbers."""
        own = type(layer).forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight: Any = layer.weight
            is_usual = x.dtype == self.dtype and x.device.type == "cpu" and not take_gradients(x, weight)
            if not is_usual or small_of(weight) is not self or not self.can_multiply():
                return own(layer, x)
            return self.multiply(x, self._packed_for(layer, x), layer)

        return forward

    def _packed_for(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.now is not None:
            return self._packed_anew(layer, x)
        packed = self.packed
        if packed is None:
            with self._packing:
                packed = self._pack(layer, x) if self.packed is None else self.packed
        return packed

    def _packed_anew(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with outside_inference_mode(), torch.no_grad():
            return self.pack(self.values(), layer, x)

    def _pack(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        packed = self._packed_anew(layer, x)
        if self.rest.tier is Tier.HOST:
            self.rest = PackedRest(packed, self.unpack, self.form, self.storage)
            _FREED.add(self.nbytes)
        else:
            let_go_of_file(self.values())
        self._made = self.rest, packed
        return packed

    def taken_over(self, views: Sequence[View]) -> Weight:
        """Its bytes for another rule, which moves them as they were before."""
        if isinstance(self.rest, PackedRest):
            self.rest = HostRest(self.rest.on_host())
        self._made = None
        return super().taken_over(views)


class _Freed:
    """Bytes of weights that were freed among others that stay, so that the heap keeps them as holes."""

    MOST = 16 * 2**20

    def __init__(self) -> None:
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """So many were freed; now and then the holes go back to the system."""
        self._nbytes += nbytes
        if self._nbytes > self.MOST:
            self._nbytes = 0
            trim_heap()


_FREED = _Freed()


class PackedRest:
    """Bytes in host memory that are there as packed numbers alone."""

    tier = Tier.HOST
    works_in_place = False
    origin = None

    def __init__(
        self,
        packed: torch.Tensor,
        unpack: Callable[[torch.Tensor, torch.Size], torch.Tensor],
        form: View,
        dtype: torch.dtype,
    ) -> None:
        self._packed, self._unpack, self._form, self._dtype = packed, unpack, form, dtype

    def on_host(self) -> torch.Tensor:
        """The numbers in their usual order, as a copy."""
        shape = torch.Size(self._form.shape)
        return flat_bytes(self._unpack(self._packed, shape), self._form, self._dtype)

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor with the bytes from `start` on."""
        target.copy_(self.on_host()[start : start + target.numel()])


def flat_bytes(numbers: torch.Tensor, form: View, dtype: torch.dtype) -> torch.Tensor:
    """A copy of numbers as flat bytes, in the order in which `form` sees them."""
    with outside_inference_mode():
        ordered = torch.empty_strided(form.shape, form.stride, dtype=dtype)
        return ordered.copy_(numbers).as_strided((ordered.numel(),), (1,)).view(torch.uint8)


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


def geometry_of(layer: Any) -> Geometry:
    """That of a convolution."""
    return layer.padding, layer.stride, layer.dilation, layer.groups
