"""Weights whose resting bytes are 8-bit numbers: what sits in their slots, and what other rules move of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.memory.ledger import Ledger
from lowtide.memory.placeholder import AtRest
from lowtide.memory.store import DeviceRest, DiskRest, HostRest, Rest
from lowtide.memory.weight import View, Weight, became, numbers_in_file
from lowtide.ops.modes import outside_inference_mode
from lowtide.ops.quantization import dequantize, fits_bfloat16, fp8_linear, holds_nan, quantize
from lowtide.weights.files import Origin
from lowtide.weights.layout import same_order

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CastWeight(Weight):
    """One floating-point parameter whose bytes at `rest` are its numbers in 8 bits, laid out as the parameter is.

    `scale` is for each output channel, float32 `[O, 1, ...]`, on the device; None for a plain cast. `original` is the
    place in a file from which the numbers came. `now` are the resting bytes on the device, while another rule has them
    there.
    """

    loses = True
    """Whether what rests is rounded."""

    def __init__(self, views: Sequence[View], rest: Rest, device: torch.device, storage: torch.dtype) -> None:
        super().__init__(views, torch.Size(views[0].shape).numel(), rest, device)
        self.storage = storage
        self.form = self.views[0]
        """How its slots see it; kept when none of them does any more, for placeholders that others hold."""
        self.scale: torch.Tensor | None = None
        self.channel_dim = 0
        self.original: DiskRest | None = None
        self.now: torch.Tensor | None = None
        self.multiplies = False
        """Whether its layer multiplies by the 8-bit numbers themselves."""
        self._has_nan: bool | None = None
        self._scale_fits: bool | None = None

    @classmethod
    def of(
        cls,
        weight: Weight,
        numbers: torch.Tensor,
        storage: torch.dtype,
        scaled: bool,
        channel_dim: int,
        compute: torch.dtype | None,
    ) -> CastWeight:
        """Quantize `numbers`, those of `weight`, which compute in `compute` (None: in the dtype they have)."""
        dtype = compute or numbers.dtype
        views = [replace(view.without_given(), offset=0, dtype=dtype) for view in weight.views]
        made = cls(views, HostRest(torch.empty(0)), weight.given, storage)
        made.channel_dim = channel_dim
        made._quantize(numbers, scaled=scaled)
        return made

    def _quantize(self, numbers: torch.Tensor, *, scaled: bool) -> None:
        dtype = None if numbers.dtype == self.dtype else self.dtype
        try:
            with outside_inference_mode(), torch.no_grad():  # what rests must serve in every mode
                values, self.scale = quantize(
                    numbers, self.storage, scaled=scaled, channel_dim=self.channel_dim, dtype=dtype
                )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._scale_fits = None
        self._has_nan = False if scaled else None  # a scale is of finite numbers, and leaves none out of range
        self.rest = resting(values)

    # ---- what it is

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self.form.dtype

    @property
    def working_bytes(self) -> int:
        """Bytes of its numbers while they work."""
        return self.nbytes * self.dtype.itemsize

    @property
    def gives_rows(self) -> bool:
        """Whether its layers only look rows up, so that it need not be dequantized whole."""
        layers = [view.slot.owner for view in self.views]
        return all(isinstance(layer, nn.Embedding) and layer.max_norm is None for layer in layers)

    @property
    def is_dequantized(self) -> bool:
        """Whether its numbers are made around the calls of its layers."""
        return not self.gives_rows and not (self.multiplies and self.dtype == torch.bfloat16)

    def values(self) -> torch.Tensor:
        """The 8-bit numbers on the device, in the shape of the weight."""
        flat = self.now
        if flat is None:
            if self.ledger is not None:
                self.ledger.miss(self.nbytes)
            if isinstance(self.rest, DiskRest):
                self.rest.origin.file.check()
            flat = self.rest.on_host() if self.device.type == "cpu" else self._on_device()
        return self._shaped(flat)

    def _on_device(self) -> torch.Tensor:
        return self.rest.flat if isinstance(self.rest, DeviceRest) else self.rest.on_host().to(self.device)

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        view = self.form
        return flat.view(self.storage).as_strided(view.shape, view.stride)

    def saved(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The 8-bit numbers and the scale on the host, as a checkpoint holds them."""
        return self._shaped(self.rest.on_host()), None if self.scale is None else self.scale.cpu()

    def forward_of(self, layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """The `forward` of a linear layer that multiplies in fp8, where it computes in bfloat16."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight: Any = layer.weight
            if self.is_dequantized or small_of(weight) is not self:
                return type(layer).forward(layer, x)
            return fp8_linear(x, self.values(), self.scale, layer.bias)  # type: ignore[arg-type]

        return forward

    # ---- dequantized

    def dequantize_into(self, flat: torch.Tensor) -> None:
        """Fill flat bytes on the device with the numbers."""
        view = self.form
        self._fill(self.values(), flat.view(self.dtype).as_strided(view.shape, view.stride))

    def _fill(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self._has_nan is None and values.device.type == "cpu":  # elsewhere it makes no difference, and takes a wait
            self._has_nan = holds_nan(values)
        if self._scale_fits is None:
            self._scale_fits = fits_bfloat16(self.scale)
        scale = None if self.scale is None else self.scale.to(out.device)
        return dequantize(values, scale, out, has_nan=bool(self._has_nan), scale_fits=self._scale_fits)

    def flat_on_host(self) -> torch.Tensor:
        """The numbers on the host."""
        return self._dequantized(self._shaped(self.rest.on_host()))

    flat_copy = flat_on_host

    def flat_for_now(self) -> torch.Tensor:
        """The numbers on the device."""
        return self._dequantized(self.values())

    def _dequantized(self, values: torch.Tensor) -> torch.Tensor:
        view = self.form
        with outside_inference_mode(), torch.no_grad():
            out = torch.empty_strided(view.shape, view.stride, dtype=self.dtype, device=values.device)
            return self._fill(values, out).as_strided((out.numel(),), (1,)).view(torch.uint8)

    def rows(self, view: View, indices: torch.Tensor, *options: Any) -> torch.Tensor:
        """The rows of an embedding that `indices` name; only these are dequantized."""
        values = torch.embedding(self.values().view(torch.int8), indices, *options).view(self.storage)
        scale = None if self.scale is None else torch.embedding(self.scale, indices)
        out = torch.empty(values.shape, dtype=view.dtype, device=values.device)
        return out.copy_(values.float() if scale is None else values.float() * scale)

    # ---- where it is

    def taken_over(self, views: Sequence[View]) -> Weight:
        """Its 8-bit bytes for another rule."""
        return Carried(views, self)

    def restore(self, *, to_given: bool) -> None:
        """Rest on the host, or where it was given; the slots hold placeholders as before."""
        flat = self.rest.on_host() if not isinstance(self.rest, DiskRest) or to_given else None
        if flat is not None and to_given and self.given.type != "cpu":
            self.rest = DeviceRest(flat.to(self.given))
        elif flat is not None and not isinstance(self.rest, DiskRest):
            self.rest = HostRest(flat)
        self.move_to(self.given if to_given else torch.device("cpu"))
        self.ledger = None
        self.lay_down()

    def move_to(self, device: torch.device) -> None:
        """Work on `device` from now on."""
        if device != self.device:
            self.device = device
            self._placeholders = {}
        if self.scale is not None:
            self.scale = self.scale.to(device)

    def set_scale(self, scale: torch.Tensor) -> None:
        """Have this scale, one number for each channel of the one dimension that is not 1."""
        self.scale, self._scale_fits = scale.to(self.device), None
        self.channel_dim = next((dim for dim, size in enumerate(scale.shape) if size != 1), 0)

    def keep_original(self, rest: DiskRest, view: View) -> None:
        """Remember the place in a file that holds the numbers as they were, seen as `view`, if they are in order."""
        origin = numbers_in_file(rest, view)
        self.original = None if origin is None else DiskRest(origin, self.dtype, (view.shape, view.stride))

    def restore_numbers(self, *, at_rest: bool) -> None:
        """Have ordinary numbers again: as the file has them, or else as the 8 bits do.

        They are in the slots, where they were given; `at_rest`, for another rule that takes over, placeholders are.
        """
        plain = Weight(self.views, self.working_bytes, self.original or HostRest(self.flat_on_host()), self.given)
        self.leave_placeholders()
        if at_rest:
            plain.lay_down()
        else:
            plain.restore(to_given=True)

    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep what a layer wrote to its weight; a slot that was given another tensor is the layer's own now."""
        pairs = zip(self.views, tensors, strict=True)
        kept = [pair for pair in pairs if pair[0].slot.now() is pair[1] or self._holds(pair[0])]
        self.views = [view for view, _ in kept]
        if kept:
            self.take(kept[0][1])

    def take(self, numbers: torch.Tensor) -> None:
        """Rest as these numbers from now on."""
        form = self.form
        laid_out = torch.empty_strided(form.shape, form.stride, dtype=numbers.dtype, device=self.device)
        self._quantize(laid_out.copy_(numbers.detach()), scaled=self.scale is not None)
        self.original = None

    def follow(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Become what `fn`, given to `Module._apply`, makes of such a tensor: another dtype, device or memory format.

        Raises `ValueError` for a dtype that layers cannot compute in.
        """
        view = self.form
        now = became(view, self.device, fn)
        if now.dtype not in FLOATING:
            raise ValueError(f"{self.name} cannot compute in {now.dtype}; it rests in 8 bits already.")
        if not same_order(view.shape, view.stride, now.stride):
            self._reorder(now.stride)
        self.views = [replace(view, stride=now.stride, dtype=now.dtype) for view in self.views]
        self.form = replace(view, stride=now.stride, dtype=now.dtype)
        if now.device != self.device:
            self.rest = resting(self.rest.on_host().to(now.device))
            self.given = now.device
        if self.original is not None:
            self.original = DiskRest(self.original.origin, now.dtype, (view.shape, now.stride))
        self._placeholders = {}
        self.move_to(now.device)
        self.lay_down()

    def _reorder(self, stride: tuple[int, ...]) -> None:
        """Rest in the order that these strides have."""
        values = self._shaped(self.rest.on_host() if self.device.type == "cpu" else self._on_device())
        with outside_inference_mode():
            ordered = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device)
        self.rest = resting(ordered.copy_(values))


class Carried(Weight):
    """The 8-bit bytes of a weight as a rule sees them: where they rest and work is stored in the weight itself."""

    def __init__(self, views: Sequence[View], whole: CastWeight) -> None:
        self.whole = whole
        super().__init__(views, whole.nbytes, whole.rest, whole.given)

    @property
    def rest(self) -> Any:
        """Where the bytes rest."""
        return self.whole.rest

    @rest.setter
    def rest(self, rest: Any) -> None:
        self.whole.rest = rest

    @property
    def device(self) -> torch.device:
        """Where they work."""
        return self.whole.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.whole.move_to(device)

    @property
    def origin(self) -> Origin | None:
        """None: these are not the numbers that a file has."""
        return None

    @property
    def ledger(self) -> Ledger | None:
        """Notes when they are loaded for one operation."""
        return self.whole.ledger

    @ledger.setter
    def ledger(self, ledger: Ledger | None) -> None:
        self.whole.ledger = ledger

    def tensors(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The bytes themselves: no slot views them."""
        return [flat]

    def put(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the layer dequantize these bytes."""
        (self.whole.now,) = tensors

    def is_changed(self, tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> bool:
        """Never: nobody but the layer sees the bytes."""
        return False

    def disown_replaced(self) -> bool:
        """Its layer sees to that."""
        return False

    def lay_down(self) -> None:
        """The bytes are gone."""
        self.whole.now = None
        self.whole.lay_down()

    @property
    def can_follow(self) -> bool:
        """Never: its layer sees to that."""
        return False

    def restore(self, *, to_given: bool) -> None:
        """Rest on the host, or where they were given."""
        self.whole.restore(to_given=to_given)


def small_of(tensor: torch.Tensor) -> CastWeight | None:
    """The 8-bit weight whose placeholder a tensor is."""
    weight = tensor.weight if isinstance(tensor, AtRest) else None
    return weight if isinstance(weight, CastWeight) else None


def resting(values: torch.Tensor) -> Rest:
    """Numbers as resting bytes, on the device where they are."""
    flat = values.as_strided((values.numel(),), (1,)).view(torch.uint8)
    return HostRest(flat) if flat.device.type == "cpu" else DeviceRest(flat)
