"""After a run: were the rates right that it was planned with? Where they were clearly off, the run corrects them.

A run is the longest measurement there is, and costs nothing. Rates that were measured while others were at work, or
before the machine was changed, would else mislead every plan from then on.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from lowtide.machine.processor_share import Share
from lowtide.measuring.meter import StageReading
from lowtide.measuring.transfers import Flow
from lowtide.planning.explain import seconds_in_words
from lowtide.planning.plan import Plan

OFF = 1.3
"""Times as long as predicted, or as short, from which on rates are corrected."""
_LEFT = 1.15
"""What a correction leaves of that, so that two models of which one is faster than the other do not take turns."""
SHORTEST = 3.0
"""Seconds, taken or predicted, below which a run tells nothing: much of them is not computing."""
_STALLED = 0.1
"""Share of a stage that it waited for weights, from which on it tells nothing of computing."""

_UNCHECKED: ContextVar[bool] = ContextVar("lowtide_unchecked", default=False)


@contextmanager
def unchecked() -> Generator[None]:
    """Inside the block runs correct nothing, as where parts of them are answered from what is known."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def correction(
    plan: Plan, readings: Sequence[StageReading], flows: Mapping[str, Flow], share: Share, threads: int, so_far: float
) -> tuple[float, str] | None:
    """By how much a call computed slower than the rates of its plan say, which are corrected `so_far`, and in words.

    None where the rates are right, and where the run does not tell: it was short, or others were at work meanwhile.
    """
    if _UNCHECKED.get() or share.was_busy(threads) or any(reading.shared for reading in readings):
        return None
    taken, predicted = _computed(plan, readings, flows)
    predicted *= so_far
    if max(taken, predicted) < SHORTEST or min(taken, predicted) <= 0 or 1 / OFF <= taken / predicted <= OFF:
        return None
    ratio = taken / predicted
    factor = ratio / _LEFT if ratio > 1 else ratio * _LEFT
    return factor, (
        f"Computing took {seconds_in_words(taken)}, where {seconds_in_words(predicted)} were predicted (load "
        f"{share.load:.1f}): this machine's rates are corrected by that for the next plans."
    )


def _computed(plan: Plan, readings: Sequence[StageReading], flows: Mapping[str, Flow]) -> tuple[float, float]:
    """Seconds of the stages that computing sets the pace of, taken and predicted."""
    taken = predicted = 0.0
    for stage in plan.stages:
        own = [reading.seconds for reading in readings if reading.name == stage.name]
        waited = flows.get(stage.name, Flow()).stalled
        if own and stage.bound == "compute" and waited <= _STALLED * sum(own):
            taken, predicted = taken + sum(own), predicted + stage.seconds  # of one call, in however many stretches
    return taken, predicted
