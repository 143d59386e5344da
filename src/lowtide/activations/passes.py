"""The plan of row streaming: which values are stored whole, which pass makes each, and how many bytes that takes.

A value is stored whole if some step needs all its rows before it makes its first: the input of a group norm, which
takes statistics, or keys and values. A value between two convolutions is stored so that no row is convolved twice. A
value smaller than the one it is made of is stored (a shortcut's convolution) so that the larger one can be freed. All
other values are made band by band. A pass makes stored values that need the same sources, from values stored before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lowtide.activations.bands import Pass, attended, base, root, totals, whole_parts
from lowtide.activations.graph import Linear, Local, Reshape, Value
from lowtide.activations.recording import Trace
from lowtide.activations.steps import Attend, Convolution, GroupNorm, Regroup

_Drafts = list[tuple[list[Value], tuple[Value, ...]]]  # passes, as targets and sources


@dataclass(frozen=True, eq=False)
class Schedule:
    """The passes of a run, in order; `input_norms` are the input or views of it that norms take statistics of."""

    trace: Trace
    passes: tuple[Pass, ...]
    input_norms: tuple[Value, ...]
    _heights: dict[int, list[int]] = field(default_factory=dict)

    def heights(self, work_bytes: int) -> list[int]:
        """For each pass the rows of a band: as many as `work_bytes` allow, and at least one."""
        if work_bytes not in self._heights:
            self._heights[work_bytes] = [_height_within(pass_, work_bytes) for pass_ in self.passes]
        return self._heights[work_bytes]

    @property
    def planes(self) -> int:
        """The most planes stored at once: those of one pass, and frames kept from the batch before and for the next."""
        at_work = max((_planes([*pass_.targets, *pass_.sources]) for pass_ in self.passes), default=0)
        return at_work + 2 * _planes(self.trace.kept.values())

    def forecast(self, work_bytes: int, page_bytes: int = 0) -> tuple[int, int]:
        """The most bytes of rows stored at once, and the most bytes of bands at work at once.

        Within a pass, targets grow and released sources shrink evenly. So the most is stored at its beginning or its
        end, plus some slack: a band, the rows around it that are needed again, and pages that are not full.
        """
        alive = {value: _nbytes(value) for value in self.trace.values if value.place is not None}
        stored = work = 0
        for pass_, height in zip(self.passes, self.heights(work_bytes), strict=True):
            work = max(work, pass_.work_bytes(height))
            kept = {target: _nbytes(target) for target in pass_.targets if target is not self.trace.output}
            leaving = [source for source in pass_.released if source in alive]
            before, all_together = sum(alive.values()), sum({**alive, **kept}.values())
            slack = page_bytes * _planes([*{*alive, *kept}, *leaving]) + height * sum(t.row_bytes for t in kept)
            slack += sum(pass_.lag(source) * source.row_bytes for source in leaving)
            alive.update(kept)
            for source in leaving:
                del alive[source]
            after = all_together if attended(pass_) else sum(alive.values())
            stored = max(
                stored, min(all_together + page_bytes * _planes({*alive, *leaving}), max(before, after) + slack)
            )
        return stored, work


def _height_within(pass_: Pass, work_bytes: int) -> int:
    low, high = 1, pass_.rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pass_.work_bytes(middle) <= work_bytes else (low, middle - 1)
    return low


def plan(trace: Trace) -> Schedule:
    """Plan the passes of a traced network."""
    order = _reaching(trace)
    users = _users(order)
    stored, copies = _stored(order, users, trace)
    drafts: _Drafts = []
    for target in (value for value in order if value in stored or value is trace.output):
        sources = _sources(target, stored, trace.source)
        index = _joinable(drafts, target, sources, copies)
        if index is None:
            drafts.append(([target], sources))
        else:
            targets, read = drafts[index]
            drafts[index] = ([*targets, target], tuple(dict.fromkeys((*read, *sources))))
    last = {source: place for place, (_, sources) in enumerate(drafts) for source in sources}
    last.update(dict.fromkeys(trace.kept.values(), len(drafts)))  # they stay for the next batch of frames
    norms = [value for value in order if isinstance(value.step, GroupNorm)]
    passes = tuple(
        _pass(targets, sources, order, stored, norms, [source for source in sources if last[source] == place])
        for place, (targets, sources) in enumerate(drafts)
    )
    watched = tuple(norm.step.inputs[0] for norm in norms if norm.step and root(norm.step.inputs[0]) is trace.source)
    return Schedule(trace, passes, watched)


def _joinable(drafts: _Drafts, target: Value, sources: tuple[Value, ...], copies: set[Value]) -> int | None:
    """The index of a pass that can make `target` too: it has as many rows, and the sources of one hold the other's.

    Only the last pass comes into question; for a smaller copy also passes before it, so that the larger is read once.
    """
    for place in range(len(drafts) - 1, -1, -1):
        targets, read = drafts[place]
        if targets[0].rows == target.rows and (set(sources) <= set(read) or set(read) <= set(sources)):
            return None if set(targets) & set(sources) else place
        if target not in copies or set(targets) & set(sources):
            return None
    return None


def _nbytes(value: Value) -> int:
    return value.rows * value.row_bytes


def _planes(values: Iterable[Value]) -> int:
    return sum(value.planes for value in values)


def _reaching(trace: Trace) -> list[Value]:
    """The values with rows that lead to the output or to kept frames, in order, without the input."""
    wanted = {trace.output, *trace.kept.values()}
    for value in reversed(trace.values):
        if value in wanted and value.step is not None:
            wanted.update(_all_inputs(value))
    return [value for value in trace.values if value in wanted and value.axis is not None and value.step is not None]


def _all_inputs(value: Value) -> Iterator[Value]:
    assert value.step is not None
    yield from value.step.inputs
    yield from whole_parts(value)


def _users(order: Iterable[Value]) -> dict[Value, list[Value]]:
    users: dict[Value, list[Value]] = {}
    for value in order:
        for source in _all_inputs(value):
            users.setdefault(source, []).append(value)
    return users


def _stored(order: list[Value], users: dict[Value, list[Value]], trace: Trace) -> tuple[set[Value], set[Value]]:
    """The values that are stored, and among them those that are smaller copies of stored values."""
    stored: set[Value] = set(trace.kept.values())
    copies: set[Value] = set()
    for value in order:
        if isinstance(value.step, GroupNorm):
            stored.add(root(value.step.inputs[0]))
        elif isinstance(value.step, Attend):
            stored |= {root(value.step.key), root(value.step.value)}
        for total in totals(value):
            assert total.step is not None
            stored |= {base(part) for part in total.step.parts}
    stored.discard(trace.source)
    stored = {value for value in stored if value.place is None}
    while (cut := _next_cut(order, users, stored, trace)) is not None:
        stored.add(cut)
    for value in order:
        if isinstance(value.step, Linear) and _is_narrower(value, stored) and value is not trace.output:
            stored.add(value)
            copies.add(value)
    return stored, copies


def _is_narrower(value: Value, stored: set[Value]) -> bool:
    """Whether a value is smaller than the stored value that it is made of, and so is better to keep."""
    assert value.step is not None
    source = root(value.step.inputs[0])
    return source in stored and _nbytes(value) < _nbytes(source)


def _next_cut(order: list[Value], users: dict[Value, list[Value]], stored: set[Value], trace: Trace) -> Value | None:
    """The next value to store so that no convolution or attention is computed twice for a row, if there is one."""
    costly: set[Value] = set()
    places = {value: place for place, value in enumerate(order)}
    for value in order:
        step = value.step
        assert step is not None
        costly_inputs = [source for source in step.inputs if source in costly and source not in stored]
        if step.halo and costly_inputs:
            return _narrowest(costly_inputs[0], costly, stored)
        if costly_inputs or isinstance(step, (Convolution, Attend)):
            costly.add(value)
            once = len(users.get(value, ())) <= 1 or _comes_together(value, users, places)
            if not once and value not in stored and value is not trace.output:
                return value
    return None


def _comes_together(value: Value, users: dict[Value, list[Value]], places: dict[Value, int]) -> bool:
    """Whether what is made of a value becomes one value again, within a band: as a norm's entries and their mean do."""
    ahead = set(users[value])
    while ahead:
        first = min(ahead, key=lambda each: places[each])
        ahead.remove(first)
        step = first.step
        if first.axis is None or step is None or step.halo or not isinstance(step, (Local, Reshape)) or totals(first):
            return False
        if not ahead:
            return True
        if first not in users:
            return False
        ahead.update(users[first])
    return False


def _narrowest(value: Value, costly: set[Value], stored: set[Value]) -> Value:
    """The smallest value on the way from `value` back to the step whose work must not be done again."""
    best = root(value)
    while value.step is not None and len(value.step.inputs) == 1 and value.step.inputs[0] in costly - stored:
        if isinstance(value.step, (Convolution, Attend)):
            break
        value = value.step.inputs[0]
        if _nbytes(value) < _nbytes(best) or (isinstance(best.step, Regroup) and _nbytes(value) == _nbytes(best)):
            best = root(value)
    return best


def _sources(target: Value, stored: set[Value], source: Value) -> tuple[Value, ...]:
    """The values read to make `target`, in a fixed order: stored values, the input, and frames of the batch before."""
    sources: dict[Value, None] = {}
    todo, seen = list(_all_inputs(target)), set()
    while todo:
        value = todo.pop(0)
        if value in seen:
            continue
        seen.add(value)
        if value in stored or value is source or value.place is not None:
            sources[value] = None
        else:
            todo.extend(_all_inputs(value))
    return tuple(sources)


def _pass(
    targets: list[Value],
    sources: tuple[Value, ...],
    order: list[Value],
    stored: set[Value],
    norms: list[Value],
    released: list[Value],
) -> Pass:
    watched = [norm.step.inputs[0] for norm in norms if norm.step and root(norm.step.inputs[0]) in targets]
    wanted = {*targets, *watched}
    for value in reversed(order):
        if value in wanted and (value in targets or value not in stored):
            assert value.step is not None
            wanted.update(value.step.inputs)
    values = tuple(value for value in order if value in wanted and (value in targets or value not in stored))
    return Pass(tuple(targets), sources, values, tuple(dict.fromkeys(watched)), tuple(released))
