"""What flowed in each stage: weight bytes moved and seconds that computing waited for them; an observer of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.memory.ledger import Ledger


@dataclass(frozen=True)
class Flow:
    """Weight bytes brought to the device and seconds that computing waited for them."""

    moved: int = 0
    stalled: float = 0.0

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.moved + other.moved, self.stalled + other.stalled)

    def since(self, earlier: Flow) -> Flow:
        """What came after `earlier`; books that were closed in between begin at nothing."""
        if earlier.moved > self.moved or earlier.stalled > self.stalled:
            return self
        return Flow(self.moved - earlier.moved, self.stalled - earlier.stalled)


def total_flow(ledgers: Iterable[Ledger]) -> Flow:
    """What these ledgers hold now, together."""
    return sum((Flow(ledger.moved, ledger.stalled) for ledger in ledgers), Flow())


def ledgers_of(modules: Iterable[Any]) -> list[Ledger]:
    """The ledgers of the streams that serve these modules, each once; none for a module that is resident."""
    from lowtide.memory.rule_changes import attachment_of

    attachments = (attachment_of(module) for module in modules)
    return list(dict.fromkeys(attachment.stream.ledger for attachment in attachments if attachment is not None))


class FlowMeter:
    """Sums up by the stage's name what flows in it, stages inside it included; `now` tells what flowed so far."""

    def __init__(self, now: Callable[[], Flow]) -> None:
        self._now = now
        self._open: list[tuple[str, Flow]] = []
        self._flows: dict[str, Flow] = {}

    def stage_started(self, name: str, steps: int | None) -> None:
        """Open an account."""
        self._open.append((name, self._now()))

    def step_done(self, name: str, step: int) -> None:
        """Steps have no accounts of their own."""

    def stage_finished(self, name: str) -> None:
        """Close the account of the innermost stage."""
        if not self._open or self._open[-1][0] != name:
            return  # an interrupt came before it was opened
        _, before = self._open.pop()
        self._flows[name] = self._flows.get(name, Flow()) + self._now().since(before)

    def report(self) -> Mapping[str, Flow]:
        """What flowed in the stages that have ended, by their names."""
        return dict(self._flows)
