"""Waits that a device is asked for are counted once it is past them, and nobody waits for that."""

from __future__ import annotations

from lowtide.memory.ledger import Ledger


class Event:
    """As those of a device; it has come to it once it `is_done`."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds, self.is_done = milliseconds, False

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, later: Event) -> float:
        assert self.is_done
        assert later.is_done, "CUDA raises"
        return later.milliseconds - self.milliseconds


def test_a_wait_counts_once_the_device_is_past_it() -> None:
    ledger, events = Ledger(), [Event(time) for time in (0, 500, 1000, 3000)]
    ledger.waits("a", 8, events[0], events[1])
    ledger.waits("b", 8, events[2], events[3])
    assert (ledger.stalled, dict(ledger.by_unit)) == (0, {})
    events[0].is_done = events[1].is_done = events[2].is_done = True
    assert ledger.stalled == 0.5
    events[3].is_done = True
    assert ledger.stalled == 2.5
    assert {name: account.stalled for name, account in ledger.by_unit.items()} == {"a": 0.5, "b": 2.0}
    assert ledger.stalled == 2.5, "each counts once"


def test_where_nobody_asks_only_those_are_kept_that_the_device_has_yet_to_come_to() -> None:
    ledger, event = Ledger(), Event(0)
    event.is_done = True
    for _ in range(100):
        ledger.waits("a", 8, event, event)
    assert not ledger._asked


def test_waits_of_before_do_not_count_after_a_reset() -> None:
    ledger, events = Ledger(), [Event(0), Event(500)]
    ledger.waits("a", 8, *events)
    ledger.reset()
    events[0].is_done = events[1].is_done = True
    assert ledger.stalled == 0
