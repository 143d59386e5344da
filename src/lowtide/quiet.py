"""Warnings that one thread does not want to hear: `warnings.catch_warnings` puts the whole process's filters aside.

Two threads in it at once leave the filters of one behind for good.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_UNWANTED: ContextVar[tuple[type[Warning], ...]] = ContextVar("lowtide_unwanted_warnings", default=())


class _IsUnwanted(type):
    """A filter asks whether a warning is a subclass of its category: here, whether it is unwanted where it is given."""

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _UNWANTED.get())


def have_filter() -> None:
    """Have the filter that `quiet` needs, for good: Python says what it has said once anew after every new filter."""
    if not warnings.filters or type(warnings.filters[0][2]) is not _IsUnwanted:
        warnings.simplefilter("ignore", _IsUnwanted("Unwanted", (Warning,), {}))


@contextmanager
def quiet(category: type[Warning] = Warning) -> Generator[None]:
    """Ignore warnings of a category in this thread while this lasts."""
    have_filter()
    before = _UNWANTED.get()
    try:
        _UNWANTED.set((*before, category))
        yield
    finally:
        _UNWANTED.set(before)
