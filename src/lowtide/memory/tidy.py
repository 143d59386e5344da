"""What a stage leaves behind is given back before the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowtide.memory.host import trim_heap
from lowtide.memory.scratch import SCRATCH
from lowtide.memory.stream import Stream


class Tidy:
    """A stage observer: what does not outlive its stage is given back at its end.

    That are weights that linger on the device and the buffers they came in, the memory of dequantized weights, and the
    holes in the heap. `streams` gives the streams that are in use then.
    """

    def __init__(self, streams: Callable[[], Iterable[Stream]] = tuple) -> None:
        self._streams = streams

    def stage_started(self, name: str, steps: int | None) -> None:
        """Nothing to do."""

    def step_done(self, name: str, step: int) -> None:
        """Nothing to do."""

    def stage_finished(self, name: str) -> None:
        """Give back."""
        for stream in self._streams():
            stream.rest()
        SCRATCH.release()
        trim_heap()
