"""How much freed memory the heap of a CPU keeps at hand, stage by stage as planned."""

from __future__ import annotations

from collections.abc import Callable

from lowtide.memory.meter import steady_malloc
from lowtide.memory.plan import Plan

KEPT = (8 * 2**20, 64 * 2**20)
"""Bytes of the blocks that the heap holds, and of what it keeps when they are freed, where that is worth it: making
their pages anew took a U-Net half as long again."""


class Heap:
    """A stage observer: sets how the heap deals with freed memory (glibc only), as the plan at work says."""

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan

    def stage_started(self, name: str, steps: int | None) -> None:
        """Keep some, or none."""
        planned = next((one for one in self._plan().stages if one.name == name), None)
        if planned is None or planned.frugal:
            steady_malloc()
        else:
            steady_malloc(*KEPT)

    def step_done(self, name: str, step: int) -> None:
        """Nothing to do."""

    def stage_finished(self, name: str) -> None:
        """Keep none."""
        steady_malloc()
