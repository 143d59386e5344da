"""Every line of the library that a call goes through, and what happens at one of them: a stop, or an interrupt."""

from __future__ import annotations

import dis
import functools
import linecache
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import lowtide

T = TypeVar("T")
C = TypeVar("C", bound=Hashable)
ROOT = Path(lowtide.__file__).parent


class Place(NamedTuple):
    """A line of a file; `leaves` where that is the end of its `with`, not the beginning."""

    file: str
    line: int
    leaves: bool

    @property
    def source(self) -> str:
        return linecache.getline(str(ROOT / self.file), self.line).strip()

    @property
    def is_possible(self) -> bool:
        """Whether CPython looks for signals here.

        It does not before it calls a function written in C, such as the `__exit__` of a lock, nor at a `try`, which is
        an instruction that does nothing, and which no `with` around it covers.
        """
        before_comment = self.source.partition("  #")[0]
        return before_comment != "try:" and not (self.leaves and before_comment.endswith(("lock:", "locked():")))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}{' (end)' if self.leaves else ''}: {self.source}"


def line_of(file: str, source: str) -> Place:
    """The first line of a file of the library that begins so."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return Place(file, next(at for at, line in enumerate(lines, 1) if line.strip().startswith(source)), leaves=False)


def watched(call: Callable[[], T], at: Callable[[Place], None], parts: tuple[str, ...] = ("",)) -> T:
    """Call, and before every line of a file that begins with one of `parts` call `at`; once that raises no more."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(str(ROOT)) or not file[len(str(ROOT)) + 1 :].startswith(parts):
            return None
        if event == "line":
            at(Place(file[len(str(ROOT)) + 1 :], frame.f_lineno, _leaves(frame)))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def at_lines_of(file: str, call: Callable[[], T], at: Callable[[int], None]) -> T:
    """Call, and before every line of a file of others call `at` with its number."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            at(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def places(call: Callable[[], Any], parts: tuple[str, ...] = ("",)) -> list[Place]:
    """The places that a call comes to, in order, each once."""
    seen: dict[Place, None] = {}
    watched(call, seen.setdefault, parts)
    return [place for place in seen if place.is_possible]


def each_once(by_case: Mapping[C, Sequence[Place]]) -> dict[C, list[Place]]:
    """Each place in one of the cases that come to it: evenly, and always the same."""
    chosen: dict[C, list[Place]] = {case: [] for case in by_case}
    for place in dict.fromkeys(place for places in by_case.values() for place in places):
        reaching = [case for case, places in by_case.items() if place in places]
        chosen[min(reaching, key=lambda case: len(chosen[case]))].append(place)
    return chosen


def interrupted(call: Callable[[], Any], where: Place) -> bool:
    """Press Ctrl-C where a call comes to a place for the first time; whether the call ended by it.

    At the end of a `with open(...)` it leaves the file to the collector, which closes it, and warns of that.
    """

    def at(place: Place) -> None:
        if place == where:
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            watched(call, at, (where.file,))
        except KeyboardInterrupt:
            return True
    return False


def _leaves(frame: FrameType) -> bool:
    """Whether the next instruction begins the call of an `__exit__`: with None for each of its three arguments."""
    return frame.f_lasti in _ends(frame.f_code)


@functools.cache
def _ends(code: CodeType) -> frozenset[int]:
    return frozenset(_three_nones(list(dis.get_instructions(code))))


def _three_nones(steps: list[dis.Instruction]) -> Iterator[int]:
    for first, second, third in zip(steps, steps[1:], steps[2:], strict=False):
        if all(step.opname.startswith("LOAD_CONST") and step.argval is None for step in (first, second, third)):
            yield first.offset
