"""How much freed memory the heap of a CPU keeps at hand, stage by stage as planned."""

from __future__ import annotations

from collections.abc import Callable

from lowtide.memory.meter import steady_malloc
from lowtide.memory.plan import Plan

KEPT = (8 * 2**20, 64 * 2**20)
"""Bytes of the blocks that the heap holds, and of what it keeps when they are freed, where that is worth it: making
their pages anew took a U-Net half as long again."""


class Heap:
    """A stage observer: sets how the heap deals with freed memory (glibc only), as the plan at work says.

    In the first step of a stage it keeps none: what is made then and stays, such as compiled kernels, would lie
    scattered among what is freed, and a U-Net under leaf offload took 300 MiB more.
    """

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan

    def stage_started(self, name: str, steps: int | None) -> None:
        """Keep none yet."""
        steady_malloc()

    def step_done(self, name: str, step: int) -> None:
        """Keep some from now on, where that was planned."""
        planned = self._plan().stage(name)
        if planned is not None and not planned.frugal:
            steady_malloc(*KEPT)

    def stage_finished(self, name: str) -> None:
        """Keep none."""
        steady_malloc()
