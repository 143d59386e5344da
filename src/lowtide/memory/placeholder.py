"""What sits in a slot while its weight rests: a tensor with a shape, a dtype and a device, and no bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from lowtide.memory.read_only import ReadOnly, written
from lowtide.ops.modes import outside_inference_mode

if TYPE_CHECKING:
    from lowtide.memory.weight import View, Weight


class AtRest(torch.Tensor):
    """What a slot holds while its weight rests: shape, strides, working dtype and device of the weight, no bytes.

    An operation on it loads the weight for that operation alone: correct, but slow. A write to it is an error.
    `detach`, and so `state_dict`, gives the resting bytes in host memory, to be read only; a deep copy is an ordinary
    tensor.
    """

    weight: Weight
    view_: View
    _is_param: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[AtRest], weight: Weight, view: View) -> AtRest:
        """Make the placeholder of one view."""
        with outside_inference_mode():
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
        for tensor in written(func, args, kwargs):
            if isinstance(tensor, AtRest):
                raise _cannot_be_written_to(tensor, str(func))
        args, kwargs = tree_map_only(AtRest, lambda tensor: tensor.for_now(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The weight in host memory, as `detach` gives it."""
        return self.in_host()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _cannot_be_written_to(self, ".data = ...")

    def in_host(self) -> torch.Tensor:
        """The weight in host memory, to be read."""
        return ReadOnly(self.view_.of(self.weight.flat_on_host()).detach(), self.weight.name)

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


def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """A backward pass through dropped weights must be an error, not garbage."""
    for tensor in tensors if torch.is_grad_enabled() else ():
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _cannot_be_written_to(tensor: AtRest, how: str) -> RuntimeError:
    return RuntimeError(
        f"{tensor.weight.name} rests on {tensor.weight.rest.tier}, so it cannot be written to ({how}). Undo that first "
        "(disable_..., or lowtide.memory.detach(module)), write, and enable it again; or load a state dict."
    )
