"""The reader: one thread that brings bytes in beside computing, one load after another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lowtide.memory.unit import Load


class Reader:
    """Carries out what it is asked for, in order. `Load.future` tells how far that is."""

    def __init__(self) -> None:
        self.begin_anew()

    def ask(self, load: Load, read: Callable[[Load], None]) -> None:
        """Have `read` called for `load`, in the reader's thread."""
        load.future = Future()  # before the thread hears of it: an interrupt in between leaves what can be called off
        self._thread.submit(_carry_out, read, load, load.future)

    def call_off(self, load: Load) -> None:
        """Have the bytes of `load` written to no more: it does not begin, or it has ended, however that was."""
        if load.future is not None and not load.future.cancel():
            load.future.exception()

    def begin_anew(self) -> None:
        """With a thread of its own, as in a forked child: what was asked for before does not come there."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lowtide-reader")


def _carry_out(read: Callable[[Load], None], load: Load, future: Future[None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        read(load)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
