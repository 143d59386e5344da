"""Run code that mixes real tensors with tensors on meta: what a network touches has no numbers, all else is real.

Small data such as tokens, masks and timesteps is computed as it is. An operator with one input on meta is done on meta.
Where code asks for a number that is not there, it is told 0, or True where it asks whether all of something holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lowtide.ops.meta_device import standing_for
from lowtide.prediction.meant_autocast import autocast_on_meta

aten = torch.ops.aten
META = torch.device("meta")
MOST_READ = 2**24
"""Numbers that are made up at once when code asks for those of a tensor on meta: a picture of 2364x2364."""
PICTURE_BYTES = 14
"""The most bytes alive at once for each number of pictures that become 8-bit ones, besides the numbers themselves:
three float32 copies (in [0, 1], times 255, rounded) and two of 8 bits."""
_ALL = {aten.all.default, aten.all.dim, aten.all.dims}
_ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist}
_MOVES = {torch.Tensor.cpu, torch.Tensor.cuda}
_OF_ONE_DEVICE = {torch.meshgrid}
"""What PyTorch checks the devices of before any operator is seen."""


class TooManyNumbersError(Exception):
    """Code asks for so many numbers of a result that it must be the result itself: nothing of interest comes after."""


@contextmanager
def absent_numbers() -> Generator[_Absent]:
    """While this lasts, tensors on meta and real ones can meet in this thread."""
    absent = _Absent()
    with absent, _Answers(absent), autocast_on_meta():
        yield absent


class _Absent(TorchDispatchMode):
    """Does operators on meta where one input is there. `read` is the most numbers that were asked for at once."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        self._chosen: dict[int, tuple[Any, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `lowtide.prediction.tracing`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func is aten.bincount.default:
            return _counts(self._most_of_one(args[0]), *args, **kwargs)
        if func in _BY_NUMBERS:
            return _BY_NUMBERS[func](*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        if not all(tensor.is_meta for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)):
            if _writes_to_real(func, args):
                return args[0]
            args, kwargs = on_meta((args, kwargs))
        result = func(*args, **kwargs)
        if func in _ALL:
            result.holds = True
        if func is aten.topk.default:
            self._remember(result[1], result[1].shape[args[2] if len(args) > 2 else -1])
        return result

    def _remember(self, places: torch.Tensor, distinct: int) -> None:
        """Places that were chosen: so many of them in a row are all different."""
        storage = places.untyped_storage()
        key = storage._cdata
        self._chosen[key] = weakref.ref(storage, lambda _: self._chosen.pop(key, None)), distinct

    def _most_of_one(self, values: torch.Tensor) -> int:
        """How often one value can be among these: once for each choice, if they are all that were chosen."""
        storage = values.untyped_storage()
        is_whole = values.numel() * values.itemsize == storage.nbytes()
        distinct = self._chosen[storage._cdata][1] if is_whole and storage._cdata in self._chosen else 1
        return -(-values.numel() // distinct)


class _Answers(TorchFunctionMode):
    """What Python asks of tensors: numbers of those on meta, and to be elsewhere, while each stays where it is.

    Numbers that are told, as in `torch.tensor([2, 3], device=x.device)`, are real whatever `x` is.
    """

    def __init__(self, absent: _Absent) -> None:
        super().__init__()
        self._absent = absent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None})
        if func in _OF_ONE_DEVICE and any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(args)):
            return func(*on_meta(args), **kwargs)
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            args = (x, *(_stays(value, x.device) for value in args[1:]))
            kwargs = {name: _stays(value, x.device) for name, value in kwargs.items()}
        if not x.is_meta:
            return func(*args, **kwargs)
        if func in _ARRAYS:
            array = np.broadcast_to(np.zeros((), _numpy_dtype(x)), self._read(x))
            return array.tolist() if func is torch.Tensor.tolist else array
        return x if func in _MOVES else func(*args, **kwargs)

    def _read(self, x: torch.Tensor) -> tuple[int, ...]:
        self._absent.read = max(self._absent.read, x.numel())
        if x.numel() > MOST_READ:
            raise TooManyNumbersError
        return tuple(x.shape)


def _answer(asked: torch.Tensor) -> bool | int | float:
    """The number that is told for one that is not there."""
    if asked.dtype is torch.bool:
        return bool(getattr(asked, "holds", False))
    return 0.0 if asked.dtype.is_floating_point else 0


def _counts(most: int, values: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    """Counts of values as uneven as they can be: where code does something for each kind, this takes the most."""
    kinds = -(-values.numel() // max(1, most))
    counts = torch.zeros(max(1, kinds, minlength), dtype=torch.int64 if weights is None else torch.float64)
    counts[:kinds] = most
    counts[max(0, kinds - 1)] -= kinds * most - values.numel()
    return counts


def _places_of_all(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)


_BY_NUMBERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _answer,
    aten.equal.default: lambda a, b: False,
    aten.nonzero.default: _places_of_all,
}
"""Operators whose results depend on numbers, and what they give where there are none."""


def _places(index: Any) -> list[Any]:
    """An index, as places where it is a mask: those that a real one has, or as many as one on meta can have."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    with standing_for(None):
        if index.is_meta:
            return [torch.empty(index.numel(), dtype=torch.int64, device=META) for _ in range(index.ndim)]
        return list(index.nonzero(as_tuple=True))


def _writes_to_real(func: Any, args: Any) -> bool:
    """Whether an operator writes to a real tensor: it keeps its numbers, which mean nothing any more."""
    if not args or not isinstance(args[0], torch.Tensor) or args[0].is_meta:
        return False
    alias = func._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def on_meta(values: Any, *, anew: bool = False) -> Any:
    """The same values with tensors on meta, which are not counted: the real ones were already.

    With `anew` those that are on meta are others too.
    """
    made: dict[int, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and not anew:
            return tensor
        if id(tensor) not in made:
            with standing_for(None):
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        return made[id(tensor)]

    return tree_map_only(torch.Tensor, empty, values)


def _numpy_dtype(x: torch.Tensor) -> Any:
    return np.zeros((), str(x.dtype).removeprefix("torch.").replace("bfloat16", "float32")).dtype


def _stays(value: Any, device: torch.device) -> Any:
    """An argument of `Tensor.to`, with this device in place of every other."""
    if isinstance(value, torch.device) or (isinstance(value, str) and not hasattr(torch, value)):
        return device
    return value.dtype if isinstance(value, torch.Tensor) else value
