"""Run a schedule: pass by pass, band by band."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lowtide.activations.frame_cache import FrameCache
from lowtide.activations.graph import Attend, GroupNorm, Local, Span, Value, inside, is_map
from lowtide.activations.pages import Pages, RowStore
from lowtide.activations.passes import Pass, Schedule, attended, freed, overwritten
from lowtide.machine.heap import trim_heap
from lowtide.ops.attention import OnlineSoftmax
from lowtide.ops.convolution import channels_last
from lowtide.ops.meta_device import standing_for
from lowtide.ops.statistics import ChannelStatistics

RowSink = Callable[[int, torch.Tensor], None]
"""Takes finished rows: the number of the first, and a map `[1, C, rows, W]` or a clip `[1, C, F, rows, W]`; from top to
bottom, none twice.

The map's memory is used again after the call.
"""

Bands = dict[Value, tuple[torch.Tensor, Span]]


@dataclass
class Progress:
    """How far a run is: bands done of all."""

    done: int
    total: int


class Run:
    """One run of a schedule over one input `[1, C, H, W]` or `[1, C, F, H, W]`; `cache` has the frames before it."""

    new_statistics = ChannelStatistics

    def __init__(
        self, module: nn.Module, schedule: Schedule, pages: Pages, work_bytes: int, cache: FrameCache | None = None
    ) -> None:
        self.module = module
        self.schedule = schedule
        self.pages = pages
        self.heights = schedule.heights(work_bytes)
        self.cache = FrameCache() if cache is None else cache
        before = (value for value in schedule.trace.values if value.place is not None)
        self._stores: dict[Value, RowStore] = {value: self.cache.stores[value.place] for value in before}  # type: ignore[index]
        self._statistics: dict[Value, ChannelStatistics] = {}
        self._constants: dict[Value, torch.Tensor] = {}
        self._affine: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rooms: dict[tuple[Value, str], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, write: RowSink, tell: Callable[[Progress], None] | None = None) -> None:
        """Compute the output and hand it to `write`."""
        self._x = x
        if self.schedule.trace.output is self.schedule.trace.source:
            write(0, x)
            return
        self._look_at_input()
        total = sum(-(-one.rows // height) for one, height in zip(self.schedule.passes, self.heights, strict=True))
        self._progress, self._tell = Progress(0, total), tell
        for one, height in zip(self.schedule.passes, self.heights, strict=True):
            self._begin(one)
            self._sweep(one, [(first, min(first + height, one.rows)) for first in range(0, one.rows, height)], write)
            self._end(one)
        self.cache.stores = {place: self._stores[value] for place, value in self.schedule.trace.kept.items()}

    def _look_at_input(self) -> None:
        """The statistics of norms directly on the input, some rows at a time."""
        for value in self.schedule.input_norms:
            self._statistics[value] = self.new_statistics()
            for first in range(0, value.rows, 16):
                span = (first, min(first + 16, value.rows))
                self._statistics[value].add(self._viewed(value, span, "statistics"))

    # ---- passes

    def _begin(self, one: Pass) -> None:
        for target in one.targets:
            if target is not self.schedule.trace.output:
                self._stores[target] = RowStore(self.pages, target.row_bytes, target.planes)
        self._statistics.update((value, self.new_statistics()) for value in one.norms)

    def _end(self, one: Pass) -> None:
        for source in one.released:
            if source in self._stores:
                self._stores.pop(source).close()
        for held in (self._constants, self._affine, self._rooms):
            held.clear()
        if self._x.device.type == "cpu":
            trim_heap()

    def _sweep(self, one: Pass, spans: list[Span], write: RowSink) -> None:
        """The bands of a pass, one after the other."""
        for span in spans:
            self._band(one, span, write)
            self._told()

    def _told(self) -> None:
        self._progress = Progress(self._progress.done + 1, self._progress.total)
        if self._tell is not None:
            self._tell(self._progress)

    def _band(self, one: Pass, span: Span, write: RowSink) -> None:
        spans, uses = one.spans(span), one.uses()
        read = [source for source in one.sources if source in spans]
        bands: Bands = {source: (self._read(source, spans[source]), spans[source]) for source in read}
        self._let_go(one, spans, span)
        for value in one.values:
            bands[value] = (self._made(value, spans[value], bands, overwrite=overwritten(value, uses)), spans[value])
            freed(value, uses)
            for source in [source for source in bands if uses[source] == 0]:
                del bands[source]
        for value in one.norms:
            self._statistics[value].add(bands[value][0])
        for target in one.targets:
            rows = bands[target][0].to(target.dtype)
            if target is self.schedule.trace.output:
                write(span[0], rows)
            else:
                self._stores[target].write(span[0], _flat(target, rows))

    def _let_go(self, one: Pass, spans: dict[Value, Span], span: Span) -> None:
        """Release the rows of sources that no later band of this pass, and no later pass, will read."""
        whole = attended(one)
        ahead = one.spans((span[1], span[1] + 1)) if span[1] < one.rows else {}
        for source in one.released:
            if source in self._stores and source in spans and source not in whole:
                self._stores[source].release(ahead[source][0] if ahead else source.rows)

    # ---- values

    def _made(self, value: Value, span: Span, bands: Bands, *, overwrite: bool) -> torch.Tensor:
        step = value.step
        assert step is not None
        if span[0] == span[1]:
            return self._x.new_empty(value.rows_shape(0), dtype=value.dtype)
        given: list[torch.Tensor] = []
        for source, wanted in zip(step.inputs, step.needs(span), strict=True):
            band, has = bands[source]
            given.append(source.part(band, has, inside(wanted, source.rows)))
        if isinstance(step, GroupNorm):
            return self._normed(value, step, given[0], overwrite=overwrite)
        if isinstance(step, Attend):
            return self._attended(step, given[0])
        if overwrite and isinstance(step, Local):
            return step.overwrite(given, self._constant)
        return step.run(given, span, self._constant)

    def _normed(self, value: Value, step: GroupNorm, x: torch.Tensor, *, overwrite: bool) -> torch.Tensor:
        if value not in self._affine:
            weight, bias = (None if one is None else self._constant(one) for one in (step.weight, step.bias))
            statistics = self._statistics[step.inputs[0]]
            shape = (1, -1, *[1] * (x.ndim - 2))
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            self._affine[value] = tuple(  # type: ignore[assignment]
                one.to(dtype).view(shape) for one in statistics.scale_and_shift(step.groups, weight, bias, step.eps)
            )
        factor, term = self._affine[value]
        if x.dtype == term.dtype:
            return torch.addcmul(term, x, factor, out=x if overwrite else None)
        with standing_for(None):
            strides = torch.empty_like(x, device="meta").stride()
        wide = self._room((value, "wide"), x.numel() * term.itemsize).view(term.dtype).as_strided(x.shape, strides)
        return torch.addcmul(term, wide.copy_(x), factor, out=wide)

    def _attended(self, step: Attend, query: torch.Tensor) -> torch.Tensor:
        """All keys and values, a band of them at a time."""
        softmax = OnlineSoftmax(query, step.scale)
        rows, queries = step.key.rows, query.shape[-2]
        assert step.key.axis is not None
        height = max(1, queries // step.key.axis.width)
        for first in range(0, rows, height):
            span = (first, min(first + height, rows))
            softmax.add(self._viewed(step.key, span, "key"), self._viewed(step.value, span, "value"))
        return softmax.result()

    def _viewed(self, value: Value, span: Span, purpose: str) -> torch.Tensor:
        """Rows of a stored value, or of a view of one."""
        if value.step is None or value in self._stores:
            return self._read(value, span, purpose)
        return value.step.run([self._viewed(value.step.inputs[0], span, purpose)], span, self._constant)

    def _read(self, value: Value, span: Span, purpose: str = "band") -> torch.Tensor:
        """Rows of a stored value, in memory that serves one purpose."""
        if value is self.schedule.trace.source:
            rows = self._x.narrow(-2, span[0], span[1] - span[0])
            return rows.clone(memory_format=channels_last(rows))
        flat = self._room((value, purpose), (span[1] - span[0]) * value.row_bytes)
        self._stores[value].read(span, flat)
        return _unflat(value, flat, span[1] - span[0])

    def _room(self, what: tuple[Value, str], nbytes: int) -> torch.Tensor:
        """Memory for a band, the same for all bands of a pass: new memory costs more time than what is put in it."""
        if what not in self._rooms or self._rooms[what].numel() < nbytes:
            self._rooms[what] = torch.empty(nbytes, dtype=torch.uint8, device=self._x.device)
        return self._rooms[what][:nbytes]

    def _constant(self, value: Value) -> torch.Tensor:
        """A weight, or what is made of weights: read once a pass, so that it may rest in between."""
        if value not in self._constants:
            if value.slot is not None:
                made = _copy(_slot(self.module, value.slot))
            else:
                assert value.step is not None
                made = value.step.run([], (0, 0), self._constant)
            self._constants[value] = made
        return self._constants[value]


def _slot(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _copy(weight: torch.Tensor) -> torch.Tensor:
    """The weight for the length of a pass; it may rest elsewhere, and is asked for once."""
    with torch.no_grad():
        if weight.ndim in (4, 5):
            return weight.clone(memory_format=channels_last(weight)).detach()
        return weight.clone().detach()


def _order(value: Value) -> list[int]:
    """Dimensions as rows are stored: that of the rows first, those behind it, those before it.

    Of maps and clips the channels are last, and each frame has its rows by itself.
    """
    assert value.axis is not None
    dim, ndim = value.axis.dim, len(value.shape)
    return [0, *range(2, ndim), 1] if is_map(value) else [*range(dim, ndim), *range(dim)]


def _flat(value: Value, rows: torch.Tensor) -> torch.Tensor:
    return rows.permute(_order(value)).contiguous().view(-1).view(torch.uint8)


def _unflat(value: Value, flat: torch.Tensor, rows: int) -> torch.Tensor:
    shape, order = value.rows_shape(rows), _order(value)
    stored = flat.view(value.dtype).view([shape[dim] for dim in order])
    inverse = [order.index(dim) for dim in range(len(order))]
    return stored.permute(inverse)
