"""What a stage leaves behind is given back before the next one begins."""

from __future__ import annotations

from lowtide.memory.host import trim_heap
from lowtide.memory.scratch import SCRATCH


class Tidy:
    """A stage observer: the memory of dequantized weights, and the holes in the heap, do not outlive their stage."""

    def stage_started(self, name: str, steps: int | None) -> None:
        """Nothing to do."""

    def step_done(self, name: str, step: int) -> None:
        """Nothing to do."""

    def stage_finished(self, name: str) -> None:
        """Give back."""
        SCRATCH.release()
        trim_heap()
