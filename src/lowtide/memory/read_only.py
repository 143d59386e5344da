"""The bytes of a weight at rest, handed out to be read: writing to them is an error, since it would be lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from lowtide.ops.modes import outside_inference_mode


class ReadOnly(torch.Tensor):
    """An ordinary tensor in host memory, but for writes: they raise `RuntimeError`, through views of it too.

    Operations on it give ordinary tensors; copies, pickles and files made of it know nothing of this class.
    """

    plain: torch.Tensor
    weight_name: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[ReadOnly], plain: torch.Tensor, weight_name: str) -> ReadOnly:
        """The same bytes as `plain`, of the weight called `weight_name`."""
        with outside_inference_mode():
            made: Any = torch.Tensor._make_subclass(cls, plain)  # type: ignore[attr-defined]
        made.plain, made.weight_name = plain, weight_name
        return made

    def __init__(self, plain: torch.Tensor, weight_name: str) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the ordinary tensors; a view of one can be read only too."""
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            if isinstance(tensor, ReadOnly):
                raise tensor._refusal(str(func))
        names: dict[int, str] = {}

        def plain(tensor: ReadOnly) -> torch.Tensor:
            names[tensor.plain.untyped_storage()._cdata] = tensor.weight_name
            return tensor.plain

        def as_given(tensor: torch.Tensor) -> torch.Tensor:
            name = names.get(tensor.untyped_storage()._cdata)
            return tensor if name is None else ReadOnly(tensor, name)

        args, kwargs = tree_map_only(ReadOnly, plain, (args, kwargs))
        return tree_map_only(torch.Tensor, as_given, func(*args, **kwargs))

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The same, without a gradient."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise self._refusal(".data = ...")

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """The numbers as an array that cannot be written to either."""
        array = self.plain.detach().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)
        return array.copy() if copy else array

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.plain.detach().clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ReadOnly({self.weight_name}: {self.plain!r})"

    def _refusal(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"{self.weight_name} is at rest, so it cannot be written to ({how}): that would be lost. Write to a copy "
            "(.clone()) and give it to load_state_dict; or undo the offload or casting first (disable_..., or "
            "lowtide.memory.detach(module)), write, and enable it again."
        )


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments of an operator that it writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, (list, tuple)) else [given]  # pyright: ignore[reportUnknownVariableType]
