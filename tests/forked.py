"""What a call gives in a forked child, also one that is forked while another thread is in the middle of something."""

from __future__ import annotations

import io
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tests.lines import Place, watched

SECONDS = 60
"""After which a child hangs; a call here takes less than one."""
BRIEFLY = 0.2
"""Seconds after which a thread waits that has not ended: where it would not wait, a slow machine hides that."""


def in_child(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `compute` returns in a forked child; `AssertionError` where it raises or hangs."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        send(compute, sending)
    os.close(sending)
    return received(receiving, child)


def send(compute: Callable[[], torch.Tensor], sending: int) -> None:
    """In a child: write the result or the error, and end."""
    signal.alarm(SECONDS)
    try:
        content = io.BytesIO()
        torch.save(compute().clone(), content)
        answer = b"+" + content.getvalue()
    except BaseException:
        answer = b"-" + traceback.format_exc().encode()
    with os.fdopen(sending, "wb") as out:
        out.write(answer)
    os._exit(0)


def received(receiving: int, child: int) -> torch.Tensor:
    """In the parent: what a child sent."""
    with os.fdopen(receiving, "rb") as answers:
        ready, _, _ = select.select([answers], [], [], 2 * SECONDS)
        answer = answers.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert answer[:1] == b"+", f"child ended with {os.waitstatus_to_exitcode(status)}: {answer[1:].decode()}"
    return torch.load(io.BytesIO(answer[1:]))


class Parked:
    """`call` in a thread of its own, which waits where it comes to a place for the first time.

    `result` is what the call returned, once it was let go on.
    """

    def __init__(self, call: Callable[[], Any], where: Place) -> None:
        self.result: Any = None
        self.has_come = False
        self._where = where
        self._stopped, self._go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(call,))

    def __enter__(self) -> Parked:
        self._thread.start()
        assert self._stopped.wait(SECONDS)
        return self

    def __exit__(self, *_: Any) -> None:
        self._go_on.set()
        self._thread.join()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = watched(call, self._at, (self._where.file,))
        finally:
            self._stopped.set()

    def _at(self, place: Place) -> None:
        if place == self._where and not self.has_come:
            self.has_come = True
            self._stopped.set()
            self._go_on.wait()


class Beside:
    """`call` in a thread of its own, begun at once. `ended` gives what it returned, or raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._begun = time.monotonic()

    @property
    def waits(self) -> bool:
        """Whether it has not ended in a time in which calls of tiny modules end."""
        self._thread.join(max(0.0, self._begun + BRIEFLY - time.monotonic()))
        return self._thread.is_alive()

    def ended(self) -> Any:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "two threads wait for each other"
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
