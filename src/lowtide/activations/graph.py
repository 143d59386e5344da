"""A network as row streaming sees it: values that have rows, and the steps that make each value from others.

Each step says which rows of its inputs it needs for some rows of its output. Rows are the rows of a picture: dimension
`H` of a map `[1, C, H, W]` or of a clip of `F` frames `[1, C, F, H, W]`. In tokens `[1, H·W, C]`, to which a map was
reshaped, a row is a group of `W` tokens; in tokens `[1, F·H·W, C]` of a clip, it is `F` such groups.

Steps with a class of their own are in `steps.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Span = tuple[int, int]
"""The number of the first row, and the number after the last row."""


@dataclass(frozen=True)
class RowAxis:
    """Where a tensor's rows are: `count` rows of `width` entries each along dimension `dim`.

    With several `planes`, all rows of the first plane come before those of the second, as in the tokens of a clip.
    """

    dim: int
    count: int
    width: int = 1
    planes: int = 1

    def size(self, rows: int) -> int:
        """Entries along the dimension, of so many rows."""
        return self.planes * rows * self.width


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the network, described as if it were whole; `axis` is None if it is made of weights alone.

    `step` makes the value; it is None for the input, for weights, for tensors given beside the input, and for frames
    kept from the batch before. `slot` is a weight's name in the network; `given` is the number of a tensor beside the
    input; `place` is where the frames are kept.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: RowAxis | None = None
    step: Step | None = None
    slot: str | None = None
    given: int | None = None
    place: int | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        assert self.axis is not None
        return self.axis.count

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize // self.rows

    @property
    def planes(self) -> int:
        """How many pictures the value holds: the frames of a clip, or a single picture."""
        if is_map(self):
            return self.shape[0] * (self.shape[2] if len(self.shape) == 5 else 1)
        return 1 if self.axis is None else self.axis.planes

    def rows_shape(self, rows: int) -> list[int]:
        """The shape of a band of `rows` rows."""
        assert self.axis is not None
        shape = list(self.shape)
        shape[self.axis.dim] = self.axis.size(rows)
        return shape

    def part(self, band: torch.Tensor, has: Span, wants: Span) -> torch.Tensor:
        """Cut the rows `wants` out of a band that has the rows `has`."""
        assert self.axis is not None
        if has == wants:
            return band
        width, dim = self.axis.width, self.axis.dim
        if wants[0] == wants[1]:
            return band.narrow(dim, 0, 0)
        if self.axis.planes > 1:
            planes = band.unflatten(dim, (self.axis.planes, -1, width))
            return planes.narrow(dim + 1, wants[0] - has[0], wants[1] - wants[0]).flatten(dim, dim + 2)
        return band.narrow(self.axis.dim, (wants[0] - has[0]) * width, (wants[1] - wants[0]) * width)


def is_half(value: Value) -> bool:
    """Whether a value is in half precision. Its norms are then computed in single precision."""
    return value.dtype.itemsize < 4


class Step:
    """How a value is made: from `inputs`, which have rows, and from weights and numbers, which have none."""

    inputs: tuple[Value, ...] = ()
    parts: tuple[Value, ...] = ()
    """Values with rows, all of which are needed for any row of the result."""
    is_view = False
    """The result has its input's rows, in the same memory."""
    shares = False
    """The result may lie in its input's memory, as that of a view always may."""
    copies = False
    """A view that takes memory of its own where its input's entries lie in another order."""
    halo = False
    """One row of the result needs several rows of the input."""
    in_place: Callable[..., Any] | None = None
    """The function that writes the result over the first input, if there is one."""

    def needs(self, span: Span) -> list[Span]:
        """The rows of each input that the rows `span` of the result need; some may lie outside the map."""
        return [span] * len(self.inputs)

    def weights(self) -> Iterator[Value]:
        """The values without rows that the step needs."""
        return iter(())

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Compute the rows `span` of the result.

        `bands` are the rows that are needed of each input, as far as they lie in its map. `constant` gives the tensor
        of a value without rows.
        """
        raise NotImplementedError


def is_map(value: Value) -> bool:
    """Whether a value is a map `[B, C, H, W]`, where `B` may be the frames of a clip, or a clip `[B, C, F, H, W]`."""
    return len(value.shape) in (4, 5) and value.axis == rows_of(value.shape)


def rows_of(shape: Sequence[int]) -> RowAxis:
    """Where the rows of a map or a clip are."""
    return RowAxis(len(shape) - 2, shape[-2])


def holds(tree: Any) -> Iterator[Value]:
    """The values in nested lists, tuples and dictionaries."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from holds(item)
    elif isinstance(tree, dict):
        yield from holds(list(tree.values()))


def filled(tree: Any, put: Callable[[Value], Any]) -> Any:
    """The same nested lists, tuples and dictionaries with something else for each value."""
    if isinstance(tree, Value):
        return put(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(filled(item, put) for item in tree)
    if isinstance(tree, dict):
        return {key: filled(item, put) for key, item in tree.items()}
    return tree


class Local(Step):
    """A function of PyTorch that needs, for a row of the result, only the same row of its inputs.

    Bands may have a wider dtype than the map: the norm of a map in half precision stays in single precision through
    elementwise functions, and is rounded once, before the next product.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        arguments: tuple[Any, dict[str, Any]],
        *,
        is_view: bool = False,
        is_elementwise: bool = False,
        in_place: Callable[..., Any] | None = None,
    ) -> None:
        self.call = call
        self.arguments = arguments
        self.in_place = in_place
        self.inputs = tuple(dict.fromkeys(value for value in holds(arguments) if value.axis is not None))
        self.is_view = self.shares = is_view
        self.is_elementwise = is_elementwise

    def weights(self) -> Iterator[Value]:
        """The values without rows among the arguments."""
        return (value for value in holds(self.arguments) if value.axis is None)

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Call the function on bands instead of maps."""
        return self._called(self.call, bands, constant)

    def overwrite(self, bands: Sequence[torch.Tensor], constant: Callable[[Value], Any]) -> torch.Tensor:
        """Call the function's in-place form, which writes the result over the first band."""
        assert self.in_place is not None
        return self._called(self.in_place, bands, constant)

    def _called(
        self, call: Callable[..., Any], bands: Sequence[torch.Tensor], constant: Callable[[Value], Any]
    ) -> torch.Tensor:
        band_of = dict(zip(self.inputs, bands, strict=True))
        if not (self.is_elementwise or self.is_view):
            band_of = {value: band.to(value.dtype) for value, band in band_of.items()}
        args, kwargs = filled(self.arguments, lambda value: band_of[value] if value in band_of else constant(value))
        return call(*args, **kwargs)


class Linear(Local):
    """A linear layer over the last dimension, or a convolution whose kernel is one pixel: a function of each pixel."""


class Made(Step):
    """A value without rows, made of weights, numbers, and tables that the network makes itself, such as `arange`.

    `pick` is the entry of the tuple that the function returns.
    """

    def __init__(
        self, func: Callable[..., Any], arguments: tuple[Any, dict[str, Any]], pick: int | None = None
    ) -> None:
        self.func = func
        self.arguments = arguments
        self.pick = pick

    @property
    def name(self) -> str:
        """The function's name; operators have the names of the functions."""
        return self.func.__name__.strip("_")

    def weights(self) -> Iterator[Value]:
        """The values that it is made of."""
        return holds(self.arguments)

    def make(self, device: torch.device, put: Callable[[Value], Any]) -> Any:
        """Call the function on a device, with `put` of the values that it is made of."""
        args, kwargs = filled(self.arguments, put)
        args = tuple(device if isinstance(part, torch.device) else part for part in args)
        if "device" in kwargs or not any(True for _ in self.weights()):
            kwargs = {**kwargs, "device": device}
        result = self.func(*args, **kwargs)
        return result if self.pick is None else result[self.pick]


class Written(Made):
    """A table into whose rows a network writes numbers: row, first column, column after the last, number."""

    def __init__(self, func: Callable[..., Any], arguments: tuple[Any, dict[str, Any]]) -> None:
        super().__init__(func, arguments)
        self.writes: list[tuple[int, int, int, float]] = []

    def make(self, device: torch.device, put: Callable[[Value], Any]) -> Any:
        """Make the table, and write the numbers into it."""
        table = super().make(device, put)
        for row, first, end, number in self.writes:
            table[row, first:end] = number
        return table

    @functools.cached_property
    def by_row(self) -> torch.Tensor:
        """The last write of each row, as `[rows, 3]`: first column, column after the last, number."""
        last = {row: (first, end, number) for row, first, end, number in self.writes}
        return torch.tensor([last.get(row, (0, 0, 0)) for row in range(max(last) + 1)], dtype=torch.float64)


class Reshape(Step):
    """Another shape for the same entries in the same order."""

    is_view = shares = True

    def __init__(self, source: Value, shape: tuple[int, ...], axis: RowAxis, *, copies: bool = False) -> None:
        self.inputs = (source,)
        self.shape = shape
        self.axis = axis
        self.copies = copies

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Reshape a band to the shape of the result, with the rows `span`."""
        shape = list(self.shape)
        shape[self.axis.dim] = self.axis.size(span[1] - span[0])
        return bands[0].reshape(shape)


def missing(span: Span, rows: int) -> Span:
    """How many rows of `span` lie above a map of `rows` rows, and how many below it."""
    return max(0, min(0, span[1]) - span[0]), max(0, span[1] - max(rows, span[0]))


def union(first: Span, second: Span) -> Span:
    """The smallest span that holds both spans; an empty span counts as the place where it is."""
    return min(first[0], second[0]), max(first[1], second[1])


def inside(span: Span, rows: int) -> Span:
    """The rows of `span` that lie in a map of `rows` rows."""
    first = min(max(span[0], 0), rows)
    return first, max(first, min(span[1], rows))
