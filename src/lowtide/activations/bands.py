"""One pass of row streaming: what it makes of the rows it reads, which rows it needs, and how many bytes that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lowtide.activations.graph import Linear, Local, Reshape, Span, Value, inside, is_half, union
from lowtide.activations.steps import Attend, GroupNorm, Total

MASK_COPIES = 6
"""Tables of the size of one head's scores that are alive while a part of a mask is made."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One sweep that makes the rows of `targets` from rows of `sources`; `values` are all that it makes, in order.

    `norms` are the values whose statistics are taken; `released` are the sources that no later pass needs.
    """

    targets: tuple[Value, ...]
    sources: tuple[Value, ...]
    values: tuple[Value, ...]
    norms: tuple[Value, ...]
    released: tuple[Value, ...]

    @property
    def rows(self) -> int:
        """Rows of the targets."""
        return self.targets[0].rows

    def spans(self, span: Span) -> dict[Value, Span]:
        """The rows of every value and source that the rows `span` of the targets need."""
        needed = dict.fromkeys((*self.targets, *self.norms), span)
        for value in reversed(self.values):
            assert value.step is not None
            for source, rows in zip(value.step.inputs, value.step.needs(needed[value]), strict=True):
                wanted = inside(rows, source.rows)
                needed[source] = union(needed.get(source, wanted), wanted)
        return needed

    def lag(self, source: Value) -> int:
        """How many rows of a source one row of the targets needs, and so how many must stay at any time."""
        middle = self.rows // 2
        first, last = self.spans((middle, middle + 1)).get(source, (0, 0))
        return last - first

    def uses(self) -> dict[Value, int]:
        """How often each value is needed within the pass; use by a view counts twice, so that it is never freed."""
        count = dict.fromkeys((*self.sources, *self.values), 0)
        for value in self.values:
            assert value.step is not None
            for source in value.step.inputs:
                count[source] += 2 if value.step.shares else 1
        for value in (*self.targets, *self.norms):
            count[value] += 1
        return count

    def bytes_of(self, span: Span) -> int:
        """Bytes of all the bands that the rows `span` of the targets need."""
        return sum((end - first) * band_row_bytes(value) for value, (first, end) in self.spans(span).items())

    def work_bytes(self, rows: int) -> int:
        """The most bytes of bands alive at once, for a band of `rows` rows in the middle of the map."""
        middle = max(0, (self.rows - rows) // 2)
        spans, uses = self.spans((middle, min(self.rows, middle + rows))), self.uses()
        sizes = {value: (span[1] - span[0]) * band_row_bytes(value) for value, span in spans.items()}
        alive = peak = sum(sizes[source] for source in self.sources if source in sizes)
        for value in self.values:
            assert value.step is not None
            in_place = (value.step.shares and not value.step.copies) or overwritten(value, uses)
            new = 0 if in_place else sizes[value]
            peak = max(peak, alive + new + scratch_bytes(value, spans[value]))
            alive += new - sum(sizes[source] for source in freed(value, uses))
        return peak


def overwritten(value: Value, uses: dict[Value, int]) -> bool:
    """Whether a value's band can be written over its first input's band, which no other step needs any more."""
    step = value.step
    assert step is not None
    if step.in_place is None or uses[step.inputs[0]] != 1:
        return False
    source = step.inputs[0].step
    return source is None or not source.shares


def freed(value: Value, uses: dict[Value, int]) -> list[Value]:
    """Count down the uses of the inputs of a value just made, and return the inputs whose memory becomes free.

    A band that a view shows counts as alive until the pass ends: views are few and small.
    """
    step = value.step
    assert step is not None
    took_over = overwritten(value, uses)
    for source in step.inputs:
        uses[source] -= 1
    gone = [source for source in step.inputs if uses[source] == 0]
    if took_over or step.shares:
        gone = [source for source in gone if source is not step.inputs[0]]
    return [source for source in gone if source.step is None or not source.step.shares]


def attended(pass_: Pass) -> set[Value]:
    """The stored keys, values and summed maps of a pass, which needs all of their rows until it ends."""
    return {_among(pass_.sources, part) for value in pass_.values for part in whole_parts(value)}


def _among(sources: tuple[Value, ...], value: Value) -> Value:
    while value not in sources and value.step is not None and value.step.inputs:
        value = value.step.inputs[0]
    return value


def whole_parts(value: Value) -> Iterator[Value]:
    """The values all of whose rows are needed for any row of a value: keys, values, and what is summed over."""
    assert value.step is not None
    yield from value.step.parts
    for total in totals(value):
        assert total.step is not None
        yield from total.step.parts


def totals(value: Value) -> list[Value]:
    """The sums over all rows among the values without rows that a value is made of."""
    assert value.step is not None
    found: dict[Value, None] = {}
    todo, seen = list(value.step.weights()), set()
    while todo:
        constant = todo.pop()
        if constant in seen or constant.step is None:
            continue
        seen.add(constant)
        if isinstance(constant.step, Total):
            found[constant] = None
        todo.extend(constant.step.weights())
    return list(found)


def base(value: Value) -> Value:
    """The value that one to be summed over is made of by cheap functions of single entries, which are computed anew."""
    while isinstance(value.step, (Local, Reshape)) and not isinstance(value.step, Linear):
        if len(value.step.inputs) != 1 or any(True for _ in value.step.weights()):
            break
        value = value.step.inputs[0]
    return value


def root(value: Value) -> Value:
    """The value whose memory a value uses: itself, unless it is a view."""
    while value.step is not None and value.step.is_view:
        value = value.step.inputs[0]
    return value


def band_row_bytes(value: Value) -> int:
    """Bytes of a row in a band at work, where norms of values in half precision are in single precision."""
    widened = isinstance(value.step, GroupNorm) and is_half(value)
    return value.row_bytes * (2 if widened else 1)


def scratch_bytes(value: Value, span: Span) -> int:
    """Bytes that a step needs beside its bands.

    For attention these are the scores, the mask, the sums, the keys and the values; for a sum over all rows, the bands
    that are summed.
    """
    rows = span[1] - span[0]
    if not isinstance(value.step, Attend):
        return sum(_summing_bytes(part, rows_alike(value, rows, part)) for part in whole_parts(value))
    key_rows = rows_alike(value, rows, value.step.key)
    queries, keys = rows * _width(value), key_rows * _width(value.step.key)
    heads = math.prod(value.shape[:-2])
    bands = rows * value.row_bytes + key_rows * (value.step.key.row_bytes + value.step.value.row_bytes)
    scores = 2 * heads + (0 if value.step.mask is None else MASK_COPIES)
    return scores * queries * keys * 4 + bands * 4 // value.dtype.itemsize


def rows_alike(value: Value, rows: int, other: Value) -> int:
    """As many rows of another value as `rows` rows are of this one: at least one."""
    return max(1, rows * other.rows // value.rows)


def _summing_bytes(part: Value, rows: int) -> int:
    """Bytes of a band of a value that is summed over, and of what it is made of."""
    bytes_, start = rows * part.row_bytes, base(part)
    while part is not start:
        assert part.step is not None
        part = part.step.inputs[0]
        bytes_ += rows * part.row_bytes
    return bytes_


def _width(value: Value) -> int:
    assert value.axis is not None
    return value.axis.width * value.axis.planes
