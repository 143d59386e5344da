"""The reader: one thread that brings bytes in beside computing, one load after another."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lowtide.memory.unit import Load

_BEGUN, _CALLED_OFF = "begun", "called off"


class Reading:
    """How far the bytes of one load have come. Each of its steps may be taken again where an interrupt came into it."""

    __slots__ = ("_end", "_error", "_fate", "_has_ended")

    def __init__(self) -> None:
        self._fate: dict[None, str] = {}
        self._has_ended = False
        self._end = threading.Lock()
        self._end.acquire()  # by nobody: it is released at the end
        self._error: BaseException | None = None

    def carry_out(self, read: Callable[[Load], None], load: Load) -> None:
        """Read, in the reader's thread, unless it is called off."""
        if self._decided(_BEGUN) == _CALLED_OFF:
            return
        try:
            read(load)
        except BaseException as error:
            self._error = error
        finally:
            self._has_ended = True
            self._end.release()

    def wait(self) -> None:
        """Wait for the end; raises what reading raised. One thread waits at a time."""
        self._come_to_end()
        if self._error is not None:
            raise self._error

    def call_off(self) -> None:
        """Have the bytes written to no more: it does not begin, or it has ended, however that was."""
        if self._decided(_CALLED_OFF) == _BEGUN:
            self._come_to_end()

    @property
    def is_called_off(self) -> bool:
        """Whether it never began, and never will."""
        return self._fate.get(None) == _CALLED_OFF

    def _decided(self, fate: str) -> str:
        return self._fate.setdefault(None, fate)  # one instruction: the first of two threads decides

    def _come_to_end(self) -> None:
        if not self._has_ended:
            self._end.acquire()  # and it stays so: nobody asks for it any more


_Jobs: TypeAlias = "SimpleQueue[tuple[Reading, Callable[[Load], None], Load] | None]"


class Reader:
    """Carries out what it is asked for, in order, in a thread that ends with it. `Load.reading` tells how far that is.

    A thread of its own and no executor: that is slower, and where an interrupt comes into the start of its thread, it
    does not know it, and no process ends.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs | None = None

    def ask(self, load: Load, read: Callable[[Load], None]) -> None:
        """Have `read` called for `load`, in the reader's thread."""
        jobs = self._jobs or self._begun()
        load.reading = Reading()  # before the thread hears of it: an interrupt in between leaves what can be called off
        jobs.put((load.reading, read, load))

    def begin_anew(self) -> None:
        """With a thread of its own, as in a forked child: what was asked for before does not come there."""
        self._jobs = None

    def _begun(self) -> _Jobs:
        jobs: _Jobs = SimpleQueue()
        thread = threading.Thread(target=_work, args=(jobs,), name="lowtide-reader", daemon=True)
        _working[thread] = jobs
        weakref.finalize(self, jobs.put, None).atexit = False
        try:
            thread.start()
        except BaseException:
            jobs.put(None)  # an interrupt: it may have started
            raise
        self._jobs = jobs
        return jobs


_working: weakref.WeakKeyDictionary[threading.Thread, _Jobs] = weakref.WeakKeyDictionary()


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        reading, read, load = job
        reading.carry_out(read, load)
        del job, reading, read, load  # while it waits, it keeps nothing


@atexit.register
def _end_all() -> None:
    """The process does not end in the middle of what a reader does."""
    for thread, jobs in list(_working.items()):
        jobs.put(None)
        if thread.is_alive():
            thread.join()
