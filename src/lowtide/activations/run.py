"""The run of row streaming: a schedule carried out pass by pass, band by band."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from lowtide.activations.bands import Pass, attended, freed, overwritten, rows_alike
from lowtide.activations.graph import Local, Made, Span, Value, inside, is_map
from lowtide.activations.masks import mask_part
from lowtide.activations.pages import Pages, RowStore
from lowtide.activations.passes import Schedule
from lowtide.activations.steps import Attend, GroupNorm, Total
from lowtide.machine.heap import trim_heap
from lowtide.ops.attention import OnlineSoftmax
from lowtide.ops.convolution import channels_last
from lowtide.ops.meta_device import standing_for
from lowtide.ops.statistics import ChannelStatistics

RowSink = Callable[[int, torch.Tensor], None]
"""Takes finished rows: the number of the first row, and a map `[1, C, rows, W]` or a clip `[1, C, F, rows, W]`.

Rows come from top to bottom, each once. The memory of the map is used again after the call.
"""

Bands = dict[Value, tuple[torch.Tensor, Span]]


@dataclass
class Progress:
    """How far a run is: `done` bands of `total`."""

    done: int
    total: int


@dataclass(frozen=True)
class Beside:
    """What a run has beside its input: the rows of frames kept before it, by their places, and tensors without rows."""

    stores: Mapping[int, RowStore] = field(default_factory=dict)
    given: Sequence[torch.Tensor] = ()


_watch: ContextVar[weakref.ref[Callable[[Progress], None]] | None] = ContextVar("lowtide_rows_watch", default=None)


@contextmanager
def watched(watch: Callable[[Progress], None]) -> Generator[None]:
    """Have `watch` called after every band of the runs in this thread that have no other; it is kept by who calls."""
    before = _watch.get()
    try:
        _watch.set(weakref.ref(watch))
        yield
    finally:
        _watch.set(before)


def watch_here() -> Callable[[Progress], None] | None:
    """What watches the runs in this thread; none that an interrupt left here."""
    reference = _watch.get()
    return None if reference is None else reference()


class Run:
    """One run of a schedule over one input `[1, C, H, W]` or `[1, C, F, H, W]`.

    `kept` are, after it, the rows of the frames that are kept for the next batch of frames, by their places.
    """

    new_statistics = ChannelStatistics

    def __init__(
        self, module: nn.Module, schedule: Schedule, pages: Pages, work_bytes: int, beside: Beside | None = None
    ) -> None:
        self.module = module
        self.schedule = schedule
        self.pages = pages
        self.heights = schedule.heights(work_bytes)
        self.kept: dict[int, RowStore] = {}
        beside = beside or Beside()
        self._given = beside.given
        self._stores: dict[Value, RowStore] = {
            value: beside.stores[value.place] for value in schedule.trace.values if value.place is not None
        }
        self._statistics: dict[Value, ChannelStatistics] = {}
        self._constants: dict[Value, torch.Tensor] = {}
        self._affine: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rooms: dict[tuple[Value, str], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, write: RowSink, tell: Callable[[Progress], None] | None = None) -> None:
        """Compute the output and hand it to `write`; call `tell` after every band."""
        self._x = x
        if self.schedule.trace.output is self.schedule.trace.source:
            write(0, x)
            return
        self._look_at_input()
        total = sum(-(-pass_.rows // height) for pass_, height in zip(self.schedule.passes, self.heights, strict=True))
        self._progress, self._tell = Progress(0, total), tell
        for pass_, height in zip(self.schedule.passes, self.heights, strict=True):
            spans = [(first, min(first + height, pass_.rows)) for first in range(0, pass_.rows, height)]
            self._begin(pass_)
            self._sweep(pass_, spans, write)
            self._end(pass_)
        self.kept = {place: self._stores.pop(value) for place, value in self.schedule.trace.kept.items()}
        for left in self._stores.values():  # of frames kept before that nobody read
            left.close()

    def _look_at_input(self) -> None:
        """Take the statistics of norms that read the input itself, 16 rows at a time."""
        for value in self.schedule.input_norms:
            self._statistics[value] = self.new_statistics()
            for first in range(0, value.rows, 16):
                span = (first, min(first + 16, value.rows))
                self._statistics[value].add(_as_one_picture(self._made_again(value, span, "statistics")))

    # ---- passes

    def _begin(self, pass_: Pass) -> None:
        for target in pass_.targets:
            if target is not self.schedule.trace.output:
                self._stores[target] = RowStore(self.pages, target.row_bytes, target.planes)
        self._statistics.update((value, self.new_statistics()) for value in pass_.norms)

    def _end(self, pass_: Pass) -> None:
        for source in pass_.released:
            if source in self._stores:
                self._stores.pop(source).close()
        for kept in (self._constants, self._affine, self._rooms):
            kept.clear()
        if self._x.device.type == "cpu":
            trim_heap()

    def _sweep(self, pass_: Pass, spans: list[Span], write: RowSink) -> None:
        """Compute the bands of a pass, one after the other."""
        for span in spans:
            self._band(pass_, span, write)
            self._band_done()

    def _band_done(self) -> None:
        self._progress = Progress(self._progress.done + 1, self._progress.total)
        if self._tell is not None:
            self._tell(self._progress)

    def _band(self, pass_: Pass, span: Span, write: RowSink) -> None:
        spans, uses = pass_.spans(span), pass_.uses()
        read = [source for source in pass_.sources if source in spans]
        bands: Bands = {source: (self._read(source, spans[source]), spans[source]) for source in read}
        self._let_go(pass_, spans, span)
        for value in pass_.values:
            bands[value] = (self._make(value, spans[value], bands, overwrite=overwritten(value, uses)), spans[value])
            freed(value, uses)
            for source in [source for source in bands if uses[source] == 0]:
                del bands[source]
        for value in pass_.norms:
            self._statistics[value].add(_as_one_picture(bands[value][0]))
        for target in pass_.targets:
            rows = bands[target][0].to(target.dtype)
            if target is self.schedule.trace.output:
                write(span[0], rows)
            else:
                self._stores[target].write(span[0], _flat(target, rows))

    def _let_go(self, pass_: Pass, spans: dict[Value, Span], span: Span) -> None:
        """Release the rows of sources that no later band of this pass, and no later pass, will read."""
        whole = attended(pass_)
        ahead = pass_.spans((span[1], span[1] + 1)) if span[1] < pass_.rows else {}
        for source in pass_.released:
            if source in self._stores and source in spans and source not in whole:
                self._stores[source].release(ahead[source][0] if ahead else source.rows)

    # ---- values

    def _make(self, value: Value, span: Span, bands: Bands, *, overwrite: bool) -> torch.Tensor:
        step = value.step
        assert step is not None
        if span[0] == span[1]:
            return self._x.new_empty(value.rows_shape(0), dtype=value.dtype)
        self._at_work = value, span[1] - span[0]
        inputs: list[torch.Tensor] = []
        for source, wanted in zip(step.inputs, step.needs(span), strict=True):
            band, has = bands[source]
            inputs.append(source.part(band, has, inside(wanted, source.rows)))
        if isinstance(step, GroupNorm):
            return self._normed(value, step, inputs[0], overwrite=overwrite)
        if isinstance(step, Attend):
            return self._attended(step, value, inputs[0], span)
        if overwrite and isinstance(step, Local):
            return step.overwrite(inputs, self._constant)
        return step.run(inputs, span, self._constant)

    def _normed(self, value: Value, step: GroupNorm, x: torch.Tensor, *, overwrite: bool) -> torch.Tensor:
        if value not in self._affine:
            self._affine[value] = self._factor_and_term(step, x)
        factor, term = self._affine[value]
        if x.dtype == term.dtype:
            return torch.addcmul(term, x, factor, out=x if overwrite else None)
        with standing_for(None):
            strides = torch.empty_like(x, device="meta").stride()
        wide = self._room((value, "wide"), x.numel() * term.itemsize).view(term.dtype).as_strided(x.shape, strides)
        return torch.addcmul(term, wide.copy_(x), factor, out=wide)

    def _factor_and_term(self, step: GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = (None if part is None else self._constant(part) for part in (step.weight, step.bias))
        pictures = len(x)  # whose channels count as those of one
        if pictures > 1:
            weight, bias = (None if part is None else part.repeat(pictures) for part in (weight, bias))
        statistics = self._statistics[step.inputs[0]]
        pair = statistics.scale_and_shift(step.groups * pictures, weight, bias, step.eps)
        shape = (pictures, -1, *[1] * (x.ndim - 2))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        factor, term = (part_C.to(dtype).view(shape) for part_C in pair)
        return factor, term

    def _attended(self, step: Attend, value: Value, query: torch.Tensor, span: Span) -> torch.Tensor:
        """Attend to all keys and values, a band of them at a time."""
        softmax = OnlineSoftmax(query, step.scale)
        for keys in self._bands_of(step.key, rows_alike(value, span[1] - span[0], step.key)):
            mask = None
            if step.mask is not None:
                mask = mask_part(step.mask, (value, span), (step.key, keys), self._constant, self._x.device)
            key, heads = self._made_again(step.key, keys, "key"), self._made_again(step.value, keys, "value")
            softmax.add(key, heads, mask)
        return softmax.result()

    def _bands_of(self, value: Value, height: int) -> Iterator[Span]:
        for first in range(0, value.rows, height):
            yield first, min(first + height, value.rows)

    def _summed(self, value: Value, step: Total) -> torch.Tensor:
        """Add up the product of two maps over bands of all their rows, in double precision."""
        total: torch.Tensor | None = None
        for span in self._bands_of(step.first, rows_alike(*self._at_work, step.first)):
            first, second = (self._made_again(part, span, "summed") for part in step.parts)
            product = (first @ second).double()
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.to(value.dtype)

    def _made_again(self, value: Value, span: Span, purpose: str) -> torch.Tensor:
        """Read rows of a stored value, or make them from rows of a stored value by functions of single entries."""
        if value.step is None or value in self._stores:
            return self._read(value, span, purpose)
        return value.step.run([self._made_again(value.step.inputs[0], span, purpose)], span, self._constant)

    def _read(self, value: Value, span: Span, purpose: str = "band") -> torch.Tensor:
        """Read rows of a stored value, into memory that is kept for one purpose."""
        if value is self.schedule.trace.source:
            rows = self._x.narrow(-2, span[0], span[1] - span[0])
            return rows.clone(memory_format=channels_last(rows))
        flat = self._room((value, purpose), (span[1] - span[0]) * value.row_bytes)
        self._stores[value].read(span, flat)
        return _unflat(value, flat, span[1] - span[0])

    def _room(self, purpose: tuple[Value, str], nbytes: int) -> torch.Tensor:
        """Memory for a band, the same for all bands of a pass: to allocate memory takes longer than to fill it."""
        if purpose not in self._rooms or self._rooms[purpose].numel() < nbytes:
            self._rooms[purpose] = torch.empty(nbytes, dtype=torch.uint8, device=self._x.device)
        return self._rooms[purpose][:nbytes]

    def _constant(self, value: Value) -> torch.Tensor:
        """A weight, or a tensor made of weights: read once a pass, so that the weight may rest in between."""
        if value not in self._constants:
            self._constants[value] = self._without_rows(value)
        return self._constants[value]

    def _without_rows(self, value: Value) -> torch.Tensor:
        if value.slot is not None:
            return _copy(_slot(self.module, value.slot))
        if value.given is not None:
            return self._given[value.given]
        if isinstance(value.step, Total):
            return self._summed(value, value.step)
        assert isinstance(value.step, Made)
        return value.step.make(self._x.device, self._constant)


def _as_one_picture(x: torch.Tensor) -> torch.Tensor:
    """The pictures of a batch as groups of channels of one."""
    return x if len(x) == 1 else x.flatten(0, 1)[None]


def _slot(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _copy(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight for the length of a pass, since the weight itself may leave the device meanwhile."""
    with torch.no_grad():
        if weight.ndim in (4, 5):
            return weight.clone(memory_format=channels_last(weight)).detach()
        return weight.clone().detach()


def _order(value: Value) -> list[int]:
    """The order of dimensions in which rows are stored: that of the rows, those after it, those before it.

    Maps and clips have their channels last, and the rows of each frame or plane lie together.
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
