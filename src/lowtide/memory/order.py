"""The order in which a module calls its units: learned from the last run, a hint for the next."""

from __future__ import annotations

from typing import Generic, TypeVar

U = TypeVar("U")


class Order(Generic[U]):
    """What was entered in the last whole run, and how far the present one has come.

    The order is circular: after the last unit comes the first one of the next step. A run in another order costs
    time, not correctness: it loads units ahead that it does not need.
    """

    def __init__(self) -> None:
        self._known: list[U] = []
        self._present: list[U] = []
        self._next = 0

    def entered(self, unit: U) -> None:
        """Note that the run has come to `unit`."""
        self._present.append(unit)
        count = len(self._known)
        for step in range(count):
            place = (self._next + step) % count
            if self._known[place] is unit:
                self._next = place + 1
                return

    def upcoming(self, count: int) -> list[U]:
        """The next `count` different units, as far as is known."""
        units: dict[int, U] = {}
        for step in range(len(self._known)):
            if len(units) == count:
                break
            unit = self._known[(self._next + step) % len(self._known)]
            units.setdefault(id(unit), unit)
        return list(units.values())

    def finished(self) -> None:
        """The run has ended well: it is what is known from now on."""
        if self._present:
            self._known = self._present
        self.abandoned()

    def abandoned(self) -> None:
        """The run has ended early: what was known before stays."""
        self._present, self._next = [], 0
