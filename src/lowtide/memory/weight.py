"""A weight: one run of bytes with all the slots that view it, and what sits in those slots while it rests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from lowtide.memory.store import DiskRest, HostRest, Rest
from lowtide.memory.view import View, became, numbers_in_file
from lowtide.weights.files import remember_origin
from lowtide.weights.layout import is_by_rows

_NOTHING = torch.empty(0)


class Weight:
    """Bytes, where they rest, and the slots that view them; ties share one weight.

    `given` is the device on which the weight was before the engine took it, `device` the one on which it works,
    `on_miss` is told when it is loaded for one operation.
    """

    def __init__(self, views: Sequence[View], nbytes: int, rest: Rest | None, given: torch.device) -> None:
        self.views = list(views)
        self.nbytes = nbytes
        self.rest: Any = rest
        self.given = given
        self.device = given
        self._placeholders: dict[tuple[Any, ...], AtRest] = {}
        self.on_miss: Callable[[Weight], None] | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.views[0].slot.name if self.views else "(replaced)"

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
        return any(_is_changed(*one) for one in zip(self.views, tensors, versions, strict=True))

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
        if self.on_miss is not None:
            self.on_miss(self)
        return self.rest.on_host().to(self.device)

    def taken_over(self, views: Sequence[View]) -> Weight:
        """The same weight for another rule, seen by these slots."""
        return Weight(views, self.nbytes, self.rest, self.given)

    @property
    def can_follow(self) -> bool:
        """Whether it can become another dtype or order of numbers without being read: it is one tensor in a file."""
        view, is_one = self.views[0], len({view.key for view in self.views}) == 1
        is_in_file = isinstance(self.rest, DiskRest) and numbers_in_file(self.rest, view) is not None
        return is_one and is_in_file and is_by_rows(view.shape, view.stride)

    def follow(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Become what `fn`, given to `Module._apply`, makes of such a tensor on the same device."""
        view = self.views[0]
        now = became(view, self.device, fn)
        origin = numbers_in_file(self.rest, view)
        assert origin is not None
        self.rest = DiskRest(origin, now.dtype, (view.shape, now.stride))
        self.views = [replace(one, dtype=now.dtype, stride=now.stride) for one in self.views]
        self.nbytes = torch.Size(view.shape).numel() * now.dtype.itemsize
        self._placeholders = {}
        self.lay_down()

    def disown_replaced(self) -> bool:
        """While it rests: slots that were given another tensor are the module's own from now on; whether any were."""
        kept = [view for view in self.views if self._holds(view.slot.now())]
        is_replaced = len(kept) < len(self.views)
        self.views = kept
        return is_replaced

    def _holds(self, tensor: torch.Tensor | None) -> bool:
        return isinstance(tensor, AtRest) and tensor.weight is self

    def forget_given(self) -> None:
        """Hold on to the tensors that were given no longer."""
        self.views = [replace(view, slot=replace(view.slot, tensor=_NOTHING)) for view in self.views]

    def lay_down(self) -> None:
        """Put placeholders into the slots."""
        for view in self.views:
            if view.key not in self._placeholders:
                self._placeholders[view.key] = AtRest(self, view)
            view.slot.put(self._placeholders[view.key])

    def rows(self, view: View, indices: torch.Tensor, *options: Any) -> torch.Tensor:
        """The rows of an embedding that `indices` name; see `torch.embedding`."""
        return torch.embedding(view.of(self.flat_for_now()).detach(), indices, *options)

    def restore(self, *, to_given: bool) -> None:
        """Put ordinary tensors into the slots: on the host, or where they were given."""
        flat = self.rest.on_host()
        tensors = self.tensors(flat.to(self.given) if to_given else flat)
        self.put(tensors)
        if isinstance(self.rest, DiskRest) and not self.rest.mappable:
            for tensor in tensors:
                remember_origin(tensor, self.rest.origin)

    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep what the module made of its own weights: written in place, they rest as they are now.

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


class AtRest(torch.Tensor):
    """What a slot holds while its weight rests: shape, strides, working dtype and device of the weight, no bytes.

    An operation on it loads the weight for this operation alone: right, and slow; a write to it is an error. `detach`,
    and so `state_dict`, gives the resting bytes as an ordinary tensor in host memory; so does a deep copy.
    """

    weight: Weight
    view_: View
    _is_param: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[AtRest], weight: Weight, view: View) -> AtRest:
        """Make the placeholder of one view."""
        with torch.inference_mode(mode=False):
            made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                view.shape,
                strides=view.stride,
                dtype=view.dtype,
                device=weight.device,
                requires_grad=view.requires_grad,
            )
        made.weight, made.view_ = weight, view
        if view.slot.kind == "parameter":
            made._is_param = True
        return made

    def __init__(self, weight: Weight, view: View) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the weight itself."""
        if func is torch.ops.aten.detach.default:
            return args[0].in_host()
        if func is torch.ops.aten.embedding.default and isinstance(args[0], AtRest):
            return args[0].weight.rows(args[0].view_, *args[1:])
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(AtRest, lambda one: one.for_now(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The weight in host memory, as `detach` gives it."""
        return self.in_host()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _cannot_be_written_to(self, ".data = ...")

    def in_host(self) -> torch.Tensor:
        """The weight in host memory, as an ordinary tensor."""
        return self.view_.of(self.weight.flat_on_host()).detach()

    def for_now(self) -> torch.Tensor:
        """The weight on its device, for one operation."""
        return self.view_.of(self.weight.flat_for_now()).detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.view_.of(self.weight.flat_copy())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view_.of(self.weight.flat_on_host()).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AtRest({self.weight.name}: {list(self.shape)}, {self.dtype}, on {self.weight.rest.tier})"


def _is_changed(view: View, tensor: torch.Tensor, version: int) -> bool:
    """Running statistics tell no version."""
    owner = view.slot.owner
    writes_statistics = isinstance(owner, _NormBase) and owner.training and view.slot.kind != "parameter"
    now = view.slot.now()  # a placeholder: an interrupted call had begun to lay it down
    is_replaced = now is not tensor and not isinstance(now, AtRest)
    return writes_statistics or is_replaced or tensor._version != version


def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """A backward pass through dropped weights must be an error, not garbage."""
    for tensor in tensors if torch.is_grad_enabled() else ():
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        for one in given if isinstance(given, (list, tuple)) else [given]:  # type: ignore[union-attr]
            if isinstance(one, AtRest):
                raise _cannot_be_written_to(one, str(func))


def _cannot_be_written_to(tensor: AtRest, how: str) -> RuntimeError:
    return RuntimeError(
        f"{tensor.weight.name} rests on {tensor.weight.rest.tier}, so it cannot be written to ({how}). Undo that first "
        "(disable_..., or lowtide.memory.detach(module)), write, and enable it again; or load a state dict."
    )
