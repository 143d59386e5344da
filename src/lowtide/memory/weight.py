"""A weight: one run of bytes with all the slots that view it, and what sits in those slots while it rests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lowtide.memory.ledger import Ledger
from lowtide.memory.placeholder import AtRest
from lowtide.memory.store import DiskRest, HostRest, Rest
from lowtide.ops.modes import outside_inference_mode
from lowtide.weights.files import Origin
from lowtide.weights.layout import is_by_rows, is_reordered
from lowtide.weights.provenance import remember_origin
from lowtide.weights.slots import Slot

_NOTHING = torch.empty(0)


class Weight:
    """Bytes, where they rest, and the slots that view them; ties share one weight.

    `given` is the device on which the weight was before the engine took it, `device` the one on which it works,
    `ledger` notes when it is loaded for one operation.
    """

    def __init__(self, views: Sequence[View], nbytes: int, rest: Rest | None, given: torch.device) -> None:
        self.views = list(views)
        self.nbytes = nbytes
        self.rest: Any = rest
        self.given = given
        self.device = given
        self._placeholders: dict[tuple[Any, ...], AtRest] = {}
        self.ledger: Ledger | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.views[0].slot.name if self.views else "(replaced)"

    @property
    def origin(self) -> Origin | None:
        """Where in a file its numbers come from, as it carries it; None for slots that see them in several ways."""
        if self.rest is None or len({view.key[:4] for view in self.views}) != 1:
            return None
        return numbers_in_file(self.rest, self.views[0]) if isinstance(self.rest, DiskRest) else self.rest.origin

    def tensors(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """One tensor for each view, the same object where it is the same tensor."""
        made: dict[tuple[Any, ...], torch.Tensor] = {}
        for view in self.views:
            if view.key not in made:
                made[view.key] = view.of(flat)
        return [made[view.key] for view in self.views]

    def put(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put tensors into the slots."""
        for view, tensor in zip(self.views, tensors, strict=True):
            view.slot.put(tensor)

    def is_changed(self, tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> bool:
        """Whether the module wrote to the tensors in its slots, or put others there."""
        for view, tensor, version in zip(self.views, tensors, versions, strict=True):
            if _is_changed(view, tensor, version):
                return True
        return False

    def flat_on_host(self) -> torch.Tensor:
        """The bytes that the slots view, on the host; perhaps those at rest themselves."""
        return self.rest.on_host()

    def flat_copy(self) -> torch.Tensor:
        """The bytes that the slots view, as a copy in host memory."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        self.rest.copy_into(flat)
        return flat

    def flat_for_now(self) -> torch.Tensor:
        """The bytes that the slots view, on the device, for one operation."""
        if self.ledger is not None:
            self.ledger.miss(self.nbytes)
        return self.rest.on_host().to(self.device)

    def taken_over(self, views: Sequence[View]) -> Weight:
        """The same weight for another rule, seen by these slots."""
        return Weight(views, self.nbytes, self.rest, self.given)

    @property
    def can_follow(self) -> bool:
        """Whether it can become another dtype or order of numbers without being read: it is one tensor in a file."""
        view, rest = self.views[0], self.rest
        if len({view.key for view in self.views}) != 1 or not isinstance(rest, DiskRest):
            return False
        is_rounded_once = rest.through is None or _keeps_all(rest.through, view.dtype)
        return is_rounded_once and _as_in_file(rest, view) is not None and is_by_rows(view.shape, view.stride)

    def follow(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Become what `fn`, given to `Module._apply`, makes of such a tensor on the same device."""
        view = self.views[0]
        now = became(view, self.device, fn)
        origin = _as_in_file(self.rest, view)
        assert origin is not None
        rounded = self.rest.through or (None if _keeps_all(origin.dtype, view.dtype) else view.dtype)
        through = None if rounded == now.dtype else rounded
        self.rest = DiskRest(origin, now.dtype, (view.shape, now.stride), through)
        self.views = [replace(view, dtype=now.dtype, stride=now.stride) for view in self.views]
        self.nbytes = torch.Size(view.shape).numel() * now.dtype.itemsize
        self._placeholders = {}
        self.lay_down()

    def disown_replaced(self) -> bool:
        """Leave slots that were given another tensor to the module; returns whether there were any. Call it at rest."""
        kept = [view for view in self.views if self._holds(view)]
        if len(kept) == len(self.views):
            return False
        self.views = kept
        return True

    def _holds(self, view: View) -> bool:
        """Whether a slot holds this weight's placeholder, or still that of the weight it is taken over from."""
        now = view.slot.now()
        return isinstance(now, AtRest) and (now.weight is self or now is view.slot.tensor)

    def forget_given(self) -> None:
        """Let go of the tensors that were given. Call it before placeholders are made, which would keep them."""
        self.views = [view.without_given() for view in self.views]

    def leave_placeholders(self) -> None:
        """Let go of the placeholders: only the slots keep them then, and the weight goes with them."""
        self._placeholders = {}

    def lay_down(self) -> None:
        """Put placeholders into the slots."""
        for view in self.views:
            placeholder = self._placeholders.get(view.key)
            if placeholder is None:
                placeholder = self._placeholders[view.key] = AtRest(self, view)
            view.slot.put(placeholder)

    def rows(self, view: View, indices: torch.Tensor, *options: Any) -> torch.Tensor:
        """The rows of an embedding that `indices` name; see `torch.embedding`."""
        return torch.embedding(view.of(self.flat_for_now()).detach(), indices, *options)

    def restore(self, *, to_given: bool) -> None:
        """Put ordinary tensors into the slots: on the host, or where they were given."""
        flat = self.rest.on_host()
        tensors = self.tensors(flat.to(self.given) if to_given else flat)
        self.put(tensors)
        if self.origin is not None:
            for tensor in tensors:
                remember_origin(tensor, self.origin)

    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep what the module wrote into its own weights: they rest with the new values.

        A slot that was given another tensor is the module's own from now on.
        """
        kept: list[View] = []
        for view, tensor in zip(self.views, tensors, strict=True):
            if view.slot.now() is tensor or isinstance(view.slot.now(), AtRest):
                kept.append(view)
        if kept:
            flat = self.flat_copy()
            for view, tensor in zip(self.views, tensors, strict=True):
                if view in kept:
                    view.of(flat).detach().copy_(tensor.detach())
            self.rest = HostRest(flat)
        self.views = kept


def _is_changed(view: View, tensor: torch.Tensor, version: int) -> bool:
    """Running statistics tell no version."""
    now = view.slot.now()
    if now is not tensor and not isinstance(now, AtRest):  # a placeholder: an interrupted call had begun to lay it down
        return True
    if tensor._version != version:
        return True
    owner = view.slot.owner
    return view.slot.kind != "parameter" and isinstance(owner, _NormBase) and owner.training


@dataclass(frozen=True, eq=False)
class View:
    """How one slot sees the bytes of its weight, from `offset` on."""

    slot: Slot
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    key: tuple[Any, ...] = field(init=False)
    """Equal for slots that hold one and the same tensor."""

    def without_given(self) -> View:
        """The same view; it does not keep the tensor that was in its slot."""
        return replace(self, slot=replace(self.slot, tensor=_NOTHING))

    def __post_init__(self) -> None:
        key = self.offset, self.shape, self.stride, self.dtype, self.slot.kind == "parameter"
        object.__setattr__(self, "key", key)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor for the slot, on the bytes `flat`.

        It requires a gradient if the slot's did: some kernels sum in another order then, also where none is taken.
        """
        length = span(self.shape, self.stride) * self.dtype.itemsize
        with outside_inference_mode():
            # .data: a version counter of its own, so that a write to one tensor is not taken for a write to another
            tensor = flat[self.offset : self.offset + length].view(self.dtype).as_strided(self.shape, self.stride).data
            return nn.Parameter(tensor, self.requires_grad) if self.slot.kind == "parameter" else tensor


def numbers_in_file(rest: DiskRest, view: View) -> Origin | None:
    """The numbers of a view as a file has them, in the order of files.

    None for spilled bytes in another order, and for numbers that were rounded through another dtype.
    """
    return _as_in_file(rest, view) if rest.through is None else None


def _as_in_file(rest: DiskRest, view: View) -> Origin | None:
    """The same, but for rounding."""
    if rest.origin.dtype != torch.uint8 or view.dtype == torch.uint8:
        return rest.origin
    return None if is_reordered(view.shape, view.stride) else replace(rest.origin, dtype=view.dtype)


def _keeps_all(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `other` has every number of a dtype."""
    if dtype == other or not (dtype.is_floating_point and other.is_floating_point):
        return dtype == other
    small, large = torch.finfo(dtype), torch.finfo(other)
    return small.eps >= large.eps and small.max <= large.max and small.tiny >= large.tiny


@dataclass(frozen=True)
class Became:
    """The dtype, device and strides that a tensor was given."""

    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]


def became(view: View, device: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> Became:
    """What `fn`, given to `Module._apply`, makes of a tensor like that of `view`: asked with a small one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(len(view.shape))
    shaped = torch.empty(view.shape, device="meta")
    probe = torch.zeros((2,) * len(view.shape), dtype=view.dtype, device=device)
    if last is not None:
        last_stride = shaped.to(memory_format=last).stride()
        is_last = view.stride == last_stride != shaped.stride()
        probe = probe.to(memory_format=last) if is_last else probe
        after = fn(probe)
        if after.is_contiguous(memory_format=last):
            return Became(after.dtype, after.device, last_stride)
    else:
        after = fn(probe)
    return Became(after.dtype, after.device, shaped.stride() if after.is_contiguous() else view.stride)


def following_in(weights: Iterable[Weight], module: nn.Module) -> list[Weight]:
    """Those of a module and its parts that become another dtype or order without being read."""
    own = set(module.modules())
    return [weight for weight in weights if weight.can_follow and all(view.slot.owner in own for view in weight.views)]


def moves(fn: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> bool:
    """Whether a function given to `Module._apply` takes tensors away from `device`."""
    return fn(torch.empty(0, device=device)).device != device


def has_moved(root: nn.Module, device: torch.device) -> bool:
    """Whether parameters of `root`, under a rule on `device` before, are on an accelerator as ordinary tensors."""
    return device.type != "cpu" and any(parameter.device.type != "cpu" for parameter in root.parameters())


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
