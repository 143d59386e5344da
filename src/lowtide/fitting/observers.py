"""What a stage leaves behind is given back before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowtide.casting.scratch import SCRATCH
from lowtide.machine.heap import FRUGAL, MALLOC, trim_heap
from lowtide.memory.stream import Stream
from lowtide.planning.plan import Plan


class Tidy:
    """A stage observer: what does not outlive its stage is given back at its end.

    That are weights that linger on the device and the buffers they came in, the memory of dequantized weights, and the
    holes in the heap; these with `every_step`, since they grow from step to step. `streams` gives the streams that are
    in use then.
    """

    def __init__(self, streams: Callable[[], Iterable[Stream]] = tuple, *, every_step: bool = False) -> None:
        self._streams = streams
        self._every_step = every_step

    def stage_started(self, name: str, steps: int | None) -> None:
        """Nothing to do."""

    def step_done(self, name: str, step: int) -> None:
        """Give the holes in the heap back, where that was asked for."""
        if self._every_step:
            trim_heap()

    def stage_finished(self, name: str) -> None:
        """Give back."""
        for stream in self._streams():
            stream.rest()
        SCRATCH.release()
        trim_heap()


KEPT = (8 * 2**20, 64 * 2**20)
"""Bytes of the blocks that the heap holds, and of what it keeps when they are freed, where that is worth it: making
their pages anew took a U-Net half as long again."""


class Heap:
    """A stage observer: wishes how the heap deals with freed memory (glibc only), as the plan at work says.

    In the first step of a stage it keeps none: what is made then and stays, such as compiled kernels, would lie
    scattered among what is freed, and a U-Net under leaf offload took 300 MiB more.
    """

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan
        self._stages: list[object] = []

    def stage_started(self, name: str, steps: int | None) -> None:
        """Keep none yet."""
        self._stages.append(object())
        MALLOC.wish(self._stages[-1], FRUGAL)

    def step_done(self, name: str, step: int) -> None:
        """Keep some from now on, where that was planned."""
        planned = self._plan().stage(name)
        if planned is not None and not planned.frugal:
            MALLOC.wish(self._stages[-1], KEPT)

    def stage_finished(self, name: str) -> None:
        """Wish for nothing more."""
        MALLOC.leave(self._stages.pop())
