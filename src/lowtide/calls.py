"""The calls of something that are under way: neither an interrupt nor a fork leaves one among them for good."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

from lowtide.forks import tell_of_forks


class Call:
    """One call. The frame that makes it keeps it, and nobody else does."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


C = TypeVar("C", bound=Call)


class Calls(Generic[C]):
    """Those under way. True where there are any.

    They are held weakly: one that an interrupt keeps from ending is forgotten with its frame. In a forked child those
    of other threads are forgotten, for these do not go on there.
    """

    def __init__(self) -> None:
        self.under_way: set[weakref.ref[C]] = set()
        """For those who ask at every call of a leaf: true where there are any, and always the same set.

        A plain one, of which each change and each copy is one instruction, which nothing comes into.
        """
        tell_of_forks(self)

    def begin(self, call: C) -> None:
        """A call begins. Enter what ends it before this."""
        self.under_way.add(weakref.ref(call, self.under_way.discard))

    def end(self, call: C) -> None:
        """It has ended, perhaps before it began."""
        self.under_way.discard(weakref.ref(call))

    def __iter__(self) -> Iterator[C]:
        calls = (reference() for reference in list(self.under_way))
        return iter([call for call in calls if call is not None])

    def __len__(self) -> int:
        return len(self.under_way)

    def after_fork(self) -> None:
        """Forget the calls of threads that a forked child has not."""
        for call in self:
            if call.thread != threading.get_ident():
                self.end(call)
