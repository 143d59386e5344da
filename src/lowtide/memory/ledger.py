"""The ledger counts weight bytes in use and bytes moved, and the time that computing waited for them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from lowtide.forks import new_lock


@dataclass
class UnitAccount:
    """What one unit took: bytes when loaded, times loaded, bytes moved, seconds waited."""

    nbytes: int
    loads: int = 0
    moved: int = 0
    stalled: float = 0.0


class Ledger:
    """Counts weight bytes in device memory; `peak` is their high-water mark since `reset`.

    `moved` counts bytes brought to the device (or, from disk to a CPU, mapped), `stalled` the seconds that computing
    waited for them, `missed` the times that a weight was asked for outside the call that it belongs to. Where computing
    waits on an accelerator, the host only asks for it, so that it is timed there: it counts once the device is past it.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self.in_use = 0
        self.peak = 0
        self.moved = 0
        self.missed = 0
        self._stalled = 0.0
        self._by_unit: dict[str, UnitAccount] = {}
        self._asked: deque[tuple[str, int, Any, Any]] = deque()

    @property
    def stalled(self) -> float:
        """Seconds that computing waited."""
        self._settle()
        return self._stalled

    @property
    def by_unit(self) -> dict[str, UnitAccount]:
        """What each unit took, by its name."""
        self._settle()
        return self._by_unit

    def take(self, nbytes: int) -> None:
        """Note that `nbytes` more are in use."""
        with self._lock:
            self.in_use += nbytes
            self.peak = max(self.peak, self.in_use)

    def give(self, nbytes: int) -> None:
        """Note that `nbytes` are not in use any more."""
        with self._lock:
            self.in_use -= nbytes
        assert self.in_use >= 0, "more bytes given back than taken"

    def recount(self, nbytes: int) -> None:
        """Note that `nbytes` are in use, whatever was noted of them by a call that was cut short."""
        with self._lock:
            self.in_use = nbytes
            self.peak = max(self.peak, nbytes)

    def loaded(self, name: str, nbytes: int, taken: int = 0) -> None:
        """Note that a unit was loaded, and that `taken` bytes more are in use for it."""
        with self._lock:
            account = self._by_unit.get(name)
            if account is None:
                account = self._by_unit[name] = UnitAccount(nbytes)
            account.loads += 1
            account.moved += nbytes
            self.moved += nbytes
            self.in_use += taken
            self.peak = max(self.peak, self.in_use)

    def waited(self, name: str, nbytes: int, seconds: float) -> None:
        """Note that computing waited for a unit."""
        with self._lock:
            self._by_unit.setdefault(name, UnitAccount(nbytes)).stalled += seconds
            self._stalled += seconds

    def waits(self, name: str, nbytes: int, before: Any, after: Any) -> None:
        """Note that a device was asked to wait for a unit, between two of its timed events."""
        with self._lock:
            self._asked.append((name, nbytes, before, after))
        self._settle()  # of those before it: no more are kept than the device has yet to come to

    def forget_waits(self) -> None:
        """Time those no more that the device has yet to come to."""
        with self._lock:
            self._asked.clear()

    def _settle(self) -> None:
        """Count the waits that the device is past. Nobody waits for the others."""
        with self._lock:
            while self._asked and self._asked[0][-1].query():
                name, nbytes, before, after = self._asked.popleft()
                self.waited(name, nbytes, before.elapsed_time(after) / 1000)

    def miss(self, nbytes: int) -> None:
        """Note that a weight was loaded for one operation alone."""
        with self._lock:
            self.missed += 1
            self.moved += nbytes

    def reset(self) -> None:
        """Begin anew, from what is in use now."""
        with self._lock:
            self.peak = self.in_use
            self.moved, self._stalled, self.missed = 0, 0.0, 0
            self._by_unit.clear()
            self._asked.clear()
