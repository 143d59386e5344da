"""One call of a pipeline at a time, and nothing changed under it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from lowtide.calls import Call, Calls
from lowtide.forks import new_lock


class CallLock:
    """Other threads wait for the end of a call; what is asked for from inside a call is refused."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._calls: Calls[Call] = Calls()

    @contextmanager
    def call(self) -> Generator[None]:
        """Bracket a call. Raises `RuntimeError` inside another one, such as in a callback."""
        this = Call()
        with self._lock:
            self._refuse(
                "and a callback cannot call it again: the scheduler's state would be lost. Build a second pipeline "
                "from the same components and another scheduler."
            )
            try:
                self._calls.begin(this)
                yield
            finally:
                self._calls.end(this)

    @contextmanager
    def alone(self) -> Generator[None]:
        """Bracket what is possible inside a call too, and not beside one of another thread."""
        with self._lock:
            yield

    @contextmanager
    def between_calls(self, changed: str) -> Generator[None]:
        """Bracket a change. Raises `RuntimeError`, saying what was to be `changed`, inside a call."""
        with self._lock:
            self._refuse(f"so {changed} cannot be changed now. Change it before the call or after it.")
            yield

    def _refuse(self, reason: str) -> None:
        if self._calls:
            raise RuntimeError(f"This pipeline is being called, {reason}")
