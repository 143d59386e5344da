"""The steps of row streaming that have a rule of their own: convolutions, padding, enlarging, norms, attention, sums.

Shapes: maps `[B, C, H, W]`, clips `[B, C, F, H, W]`, tokens `[..., H·W, C]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.activations.graph import RowAxis, Span, Step, Value, is_half, missing
from lowtide.ops.convolution import conv3d

Around = tuple[int, int, int, int, int, int]
"""Padding on the left, the right, above, below, before the first frame, and after the last."""


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
    """Padding of a map or a clip with a constant; negative widths cut rows, columns or frames off."""

    def __init__(self, source: Value, around: Around, value: float) -> None:
        self.inputs = (source,)
        self.around = around
        self.value = value

    def needs(self, span: Span) -> list[Span]:
        """The same rows, shifted by the padding above."""
        return [(span[0] - self.around[2], span[1] - self.around[2])]

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Pad the columns and frames, and the rows where the band touches the edge of the map."""
        above, below = missing(self.needs(span)[0], self.inputs[0].rows)
        return F.pad(bands[0], _sides(self.around, (above, below), bands[0].ndim), value=self.value)


class PadFromInside(Step):
    """Padding with the nearest entries (`replicate`) or with those mirrored at the edge (`reflect`)."""

    def __init__(self, source: Value, around: Around, mode: str) -> None:
        self.inputs = (source,)
        self.around, self.mode = around, mode

    def needs(self, span: Span) -> list[Span]:
        """The rows of the map among the same rows, and those at its edge that are repeated outside it."""
        (first, end), (above, below) = self._outside(span)
        rows, reach = self.inputs[0].rows, 0 if self.mode == "replicate" else 1
        if above:
            end = max(end, 1 + reach * above)
        if below:
            first = min(first, rows - 1 - reach * below)
        return [(max(first, 0), min(end, rows))]

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Pad the columns and frames, and the rows where the band touches the edge; cut off rows outside `span`."""
        (first, end), (above, below) = self._outside(span)
        padded = F.pad(bands[0], _sides(self.around, (above, below), bands[0].ndim), mode=self.mode)
        start = first + above - self.needs(span)[0][0]
        return padded.narrow(-2, start, end - first)

    def _outside(self, span: Span) -> tuple[Span, Span]:
        """The rows `span` counted in rows of the input, and how many to add above and below the map for them."""
        first, end = span[0] - self.around[2], span[1] - self.around[2]
        return (first, end), (max(0, -first), max(0, end - self.inputs[0].rows))


def _sides(around: Around, rows: Span, ndim: int) -> tuple[int, ...]:
    return (*around[:2], *rows, *around[4:])[: 2 * (ndim - 2)]


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


class Regroup(Step):
    """The same entries with other groups of them as rows: pixels that were shuffled make two rows of one, say."""

    shares = True

    def __init__(self, source: Value, axis: RowAxis) -> None:
        self.inputs = (source,)
        self.axis = axis

    def needs(self, span: Span) -> list[Span]:
        """The rows that hold the entries of these rows."""
        old, new = self._widths()
        return [(span[0] * new // old, -(-span[1] * new // old))]

    def run(self, bands: Sequence[torch.Tensor], span: Span, constant: Callable[[Value], Any]) -> torch.Tensor:
        """Cut off the entries outside `span`."""
        old, new = self._widths()
        start = span[0] * new - self.needs(span)[0][0] * old
        return bands[0].narrow(self.axis.dim, start, (span[1] - span[0]) * new)

    def _widths(self) -> tuple[int, int]:
        old = self.inputs[0].axis
        assert old is not None
        return old.width, self.axis.width


def regrouped(value: Value, axis: RowAxis) -> Value:
    """The value with other rows; raises `AssertionError` where they are not made of the same entries."""
    if value.axis == axis:
        return value
    assert value.axis is not None
    assert (value.axis.planes, axis.planes, value.axis.dim) == (1, 1, axis.dim)
    assert value.axis.size(value.rows) == axis.size(axis.count)
    return Value(value.shape, value.dtype, axis, Regroup(value, axis))


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
    """Scaled dot-product attention: a row of queries needs all keys and values.

    `mask` is added to the scores; it has no rows, and is made in parts (see `masks.py`).
    """

    def __init__(self, query: Value, key: Value, value: Value, scale: float | None, mask: Value | None = None) -> None:
        self.inputs = (query,)
        self.key, self.value = self.parts = (key, value)
        self.scale, self.mask = scale, mask


class Total(Step):
    """A product of matrices that sums over all pixels, as linear attention does: first `[..., A, H·W]` times second
    `[..., H·W, B]`. The result has no rows.
    """

    def __init__(self, first: Value, second: Value) -> None:
        self.first, self.second = self.parts = (first, second)
