"""A network as row streaming sees it: values that have rows, and the steps that make each value from others.

Each step says which rows of its inputs it needs for some rows of its output. Rows are the rows of a picture: dimension
`H` of a map `[1, C, H, W]` or of a clip of `F` frames `[1, C, F, H, W]`. In tokens `[1, H·W, C]`, to which a map was
reshaped, a row is a group of `W` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.ops.convolution import conv3d

Span = tuple[int, int]
"""The number of the first row, and the number after the last row."""


@dataclass(frozen=True)
class RowAxis:
    """Where a tensor's rows are: `count` rows of `width` entries each along dimension `dim`."""

    dim: int
    count: int
    width: int = 1


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the network, described as if it were whole; `axis` is None if it is made of weights alone.

    `step` makes the value; it is None for the input, for weights, and for frames kept from the batch before. `slot` is
    a weight's name in the network; `place` is where a `FrameCache` keeps the frames.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: RowAxis | None = None
    step: Step | None = None
    slot: str | None = None
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
        return self.shape[2] if len(self.shape) == 5 and is_map(self) else 1

    def rows_shape(self, rows: int) -> list[int]:
        """The shape of a band of `rows` rows."""
        assert self.axis is not None
        shape = list(self.shape)
        shape[self.axis.dim] = rows * self.axis.width
        return shape

    def part(self, band: torch.Tensor, has: Span, wants: Span) -> torch.Tensor:
        """Cut the rows `wants` out of a band that has the rows `has`."""
        assert self.axis is not None
        if has == wants:
            return band
        width = self.axis.width
        if wants[0] == wants[1]:
            return band.narrow(self.axis.dim, 0, 0)
        return band.narrow(self.axis.dim, (wants[0] - has[0]) * width, (wants[1] - wants[0]) * width)


def is_half(value: Value) -> bool:
    """Whether a value is in half precision. Its norms are then computed in single precision."""
    return value.dtype.itemsize < 4


class Step:
    """How a value is made: from `inputs`, which have rows, and from weights and numbers, which have none."""

    inputs: tuple[Value, ...] = ()
    is_view = False
    """The result shares its input's memory."""
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
    """Whether a value is a map `[1, C, H, W]` or a clip `[1, C, F, H, W]`."""
    return len(value.shape) in (4, 5) and value.shape[0] == 1 and value.axis == rows_of(value.shape)


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


def _filled(tree: Any, put: Callable[[Value], Any]) -> Any:
    if isinstance(tree, Value):
        return put(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_filled(item, put) for item in tree)
    if isinstance(tree, dict):
        return {key: _filled(item, put) for key, item in tree.items()}
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
        self.is_view = is_view
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
        args, kwargs = _filled(self.arguments, lambda value: band_of[value] if value in band_of else constant(value))
        return call(*args, **kwargs)


class Linear(Local):
    """A linear layer over the last dimension, or a convolution whose kernel is one pixel: a function of each pixel."""


class Reshape(Step):
    """Another shape for the same entries in the same order."""

    is_view = True

    def __init__(self, source: Value, shape: tuple[int, ...], axis: RowAxis) -> None:
        self.inputs = (source,)
        self.shape = shape
        self.axis = axis

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Reshape a band to the shape of the result, with the rows `span`."""
        shape = list(self.shape)
        shape[self.axis.dim] = (span[1] - span[0]) * self.axis.width
        return bands[0].reshape(shape)


class Convolution(Step):
    """A convolution of a map or a clip that is padded with zeros."""

    halo = True

    def __init__(
        self,
        source: Value,
        weights: tuple[Value, Value | None],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> None:
        self.inputs = (source,)
        self.weight, self.bias = weights
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.reach = dilation[-2] * (self.weight.shape[-2] - 1) + 1

    def needs(self, span: Span) -> list[Span]:
        """The rows that the kernel covers."""
        stride, padding = self.stride[-2], self.padding[-2]
        return [(span[0] * stride - padding, (span[1] - 1) * stride - padding + self.reach)]

    def weights(self) -> Iterator[Value]:
        """Weight and bias."""
        return (value for value in (self.weight, self.bias) if value is not None)

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Convolve a band; rows of zeros are added only where the band touches the edge of the map."""
        weight = constant(self.weight)
        above, below = missing(self.needs(span)[0], self.inputs[0].rows)
        band = bands[0].to(weight.dtype)
        rows = above if above == below else 0
        if above != below:
            band = F.pad(band, (0, 0, above, below))
        bias = None if self.bias is None else constant(self.bias)
        padding = (*self.padding[:-2], rows, self.padding[-1])
        return convolve(band, weight, bias, self.stride, padding, self.dilation, self.groups)


def convolve(band: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    """Convolve a map or a clip; a clip is first laid out with channels last, if it is not yet."""
    if band.ndim == 5:
        return conv3d(band.contiguous(memory_format=torch.channels_last_3d), weight, *args)
    return F.conv2d(band, weight, *args)


class Pad(Step):
    """Padding of a map with a constant; negative widths cut rows or columns off."""

    def __init__(self, source: Value, around: tuple[int, int, int, int], value: float) -> None:
        self.inputs = (source,)
        self.left, self.right, self.top, self.bottom = around
        self.value = value

    def needs(self, span: Span) -> list[Span]:
        """The same rows, shifted by the padding above."""
        return [(span[0] - self.top, span[1] - self.top)]

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Pad the columns, and the rows where the band touches the edge of the map."""
        above, below = missing(self.needs(span)[0], self.inputs[0].rows)
        return F.pad(bands[0], (self.left, self.right, above, below), value=self.value)


class Enlarge(Step):
    """Nearest-neighbour enlargement by whole numbers."""

    def __init__(self, source: Value, factors: tuple[int, ...]) -> None:
        self.inputs = (source,)
        self.factors = factors

    def needs(self, span: Span) -> list[Span]:
        """The rows that are repeated."""
        return [(span[0] // self.factors[-2], -(-span[1] // self.factors[-2]))]

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Enlarge the rows, and cut off the repeats outside `span`."""
        scale = tuple(float(factor) for factor in self.factors)
        large = F.interpolate(bands[0], scale_factor=scale, mode="nearest")
        start = span[0] - self.needs(span)[0][0] * self.factors[-2]
        return large.narrow(-2, start, span[1] - span[0])


class GroupNorm(Step):
    """Normalisation by the mean and variance of groups of channels over the whole map (Wu & He 2018, eq. 1)."""

    def __init__(self, source: Value, groups: int, weights: tuple[Value | None, Value | None], eps: float) -> None:
        self.inputs = (source,)
        self.groups, self.eps = groups, eps
        self.weight, self.bias = weights
        self.in_place = None if is_half(source) else torch.addcmul

    def weights(self) -> Iterator[Value]:
        """Scale and shift."""
        return (value for value in (self.weight, self.bias) if value is not None)


class Attend(Step):
    """Scaled dot-product attention: a row of queries needs all keys and values."""

    def __init__(self, query: Value, key: Value, value: Value, scale: float | None) -> None:
        self.inputs = (query,)
        self.key, self.value = key, value
        self.scale = scale


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
