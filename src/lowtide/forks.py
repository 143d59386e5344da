"""What a forked child makes anew: it has the objects of its parent, and of its threads only the one that forked.

A lock that another thread held at that moment would never be free again, and what only that thread would have ended
would never end.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """Something that is not as it was in a forked child."""

    def after_fork(self) -> None:
        """Go on in the child without the threads that only the parent has. All locks are as they should be by now."""
        ...


_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_others: weakref.WeakSet[Forked] = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A `threading.Lock` that is free in a forked child."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_rlock() -> Any:
    """A `threading.RLock` that is free in a forked child, unless the thread that forked holds it."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def tell_of_forks(thing: Forked) -> None:
    """Have `thing.after_fork` called in forked children, as long as something else keeps it."""
    _others.add(thing)


def _begin_anew() -> None:
    for lock in list(_locks):
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock._at_fork_reinit()  # as the locks of the standard library do
    for thing in list(_others):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
