"""What a stage leaves behind is given back before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowtide.memory.host import trim_heap
from lowtide.memory.scratch import SCRATCH
from lowtide.memory.stream import Stream


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
