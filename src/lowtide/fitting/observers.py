"""Stage observers under a plan: give memory back after each stage, and set how the heap keeps freed memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowtide.casting.scratch import SCRATCH
from lowtide.machine.heap import FRUGAL, MALLOC, Wish, trim_heap
from lowtide.memory.stream import Stream
from lowtide.planning.plan import Plan


class Tidy:
    """A stage observer: gives memory back at the end of each stage.

    It drops weights that stayed on the device and their buffers, frees the buffer for dequantized weights, and returns
    the heap's holes to the system; the holes after every step, too, with `every_step`, since they grow. `streams` gives
    the streams that are in use.
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


KEPT = (16 * 2**20, 64 * 2**20)
"""Bytes of the blocks that the heap holds, and of what it keeps when they are freed, where that is worth it: making
their pages anew took a U-Net half as long again."""
KEPT_BESIDE_STREAMS = (4 * 2**20, 64 * 2**20)
"""The same where weights come and go, among whose buffers larger blocks leave holes: 0.13 GB with 16 MiB."""


class Heap:
    """A stage observer: says how much freed memory the heap may keep (glibc only), as the plan at work has it.

    The heap keeps none in the first step of a stage. Compiled kernels and other memory that stays is allocated in that
    step. With freed blocks kept between them, a U-Net under leaf offload took 0.3 GB more.
    """

    def __init__(self, plan: Callable[[], Plan]) -> None:
        self._plan = plan
        self._stages: list[Wish] = []

    def stage_started(self, name: str, steps: int | None) -> None:
        """Keep none yet."""
        self._stages.append(Wish())
        MALLOC.wish(self._stages[-1], FRUGAL)

    def step_done(self, name: str, step: int) -> None:
        """Keep some from now on, where that was planned."""
        plan = self._plan()
        planned = plan.stage(name)
        if planned is not None and not planned.frugal:
            component = plan.components.get(planned.component)
            is_resident = component is not None and component.rule is None
            MALLOC.wish(self._stages[-1], KEPT if is_resident else KEPT_BESIDE_STREAMS)

    def stage_finished(self, name: str) -> None:
        """Wish for nothing more."""
        if self._stages:
            MALLOC.leave(self._stages.pop())
