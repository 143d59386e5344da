"""Seconds and peak memory of each stage: an observer of `lowtide.stages`."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.calls import Call
from lowtide.forks import tell_of_forks
from lowtide.measuring.peaks import Peaks, PeakSource, accelerators_in_use
from lowtide.measuring.timeline import Samples, StageMark, Timeline
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class StageReading:
    """What one stage took; sizes in bytes, `None` where this machine cannot tell.

    `peak_rss` and the peaks on devices are exact; `peak_anonymous` and `peak_file` are sampled, so they are lower
    bounds, reached at different moments: they need not add up to `peak_rss`. `depth` is 0 for an outermost stage.
    `shared` tells whether another meter was open at the same time: peaks are those of the process, so they cover both
    runs.
    """

    name: str
    depth: int
    seconds: float
    peak_rss: int
    peak_anonymous: int | None
    peak_file: int | None
    peak_device: int | None
    peak_device_reserved: int | None
    shared: bool = False


class Meter:
    """Measures each stage it observes, also nested ones; a stage's peak covers the stages inside it.

    `interval` is the time between two samples in seconds; `None` samples at stage boundaries and steps alone. While
    a stage runs, the process's `VmHWM` and PyTorch's peak statistics are reset; other meters are told what they said.
    With `timeline` the samples are kept: see `Meter.timeline`.
    """

    def __init__(self, interval: float | None = 0.01, *, timeline: bool = False) -> None:
        self._samples = Samples() if timeline else None
        self._source = PeakSource(interval, None if self._samples is None else self._samples.add)
        self._open: list[_OpenStage] = []
        self._begun: list[_OpenStage] = []
        tell_of_forks(self)

    def stage_started(self, name: str, steps: int | None) -> None:
        """Begin to measure `name`."""
        if self._open:
            self._open[-1].add(self._source.take())
        else:
            self._source.start()
        stage = _OpenStage(name, len(self._open))
        self._open.append(stage)
        self._begun.append(stage)

    def step_done(self, name: str, step: int) -> None:
        """Sample the memory in use."""
        self._source.sample()

    def stage_finished(self, name: str) -> None:
        """End the measurement of `name`, which must be the innermost stage."""
        if self._open and self._open[-1].name == name:  # else an interrupt came before it was begun
            stage = self._open.pop()
            stage.end = _Moment()
            stage.add(self._source.take())
            if self._open:
                self._open[-1].add(stage.peaks)
        if not self._open:
            self._source.stop()

    def after_fork(self) -> None:
        """In a forked child the stages of other threads do not go on."""
        self._open = [stage for stage in self._open if stage.thread == threading.get_ident()]

    @property
    def exact_rss(self) -> bool:
        """Whether `peak_rss` is the kernel's own high-water mark; if not, it is sampled."""
        return self._source.exact_rss

    def report(self) -> list[StageReading]:
        """The readings of all finished stages, in the order in which they began."""
        return [stage.reading() for stage in self._begun if stage.end is not None]

    def timeline(self) -> Timeline:
        """Memory over time since this meter was made, and the stages that have ended; for `Meter(timeline=True)`."""
        if self._samples is None:
            raise ValueError("This meter keeps no samples: make it with Meter(timeline=True).")
        begin = self._samples.begin
        ended = [(stage, stage.end) for stage in self._begun if stage.end is not None]
        marks = (
            StageMark(
                stage.name, stage.depth, stage.start.host - begin, end.host - begin, stage.peaks.rss, stage.peaks.device
            )
            for stage, end in ended
        )
        return Timeline(self._samples.kept(), tuple(marks))

    def table(self) -> Table:
        """The readings for a terminal: stages of one name in one row, and a row for the whole."""
        return _table(self.report(), exact_rss=self.exact_rss)


class _Moment:
    """A point in time, for the host and, where accelerators are in use, for the work queued on their streams."""

    def __init__(self) -> None:
        self.host = time.perf_counter()
        self.events: dict[Any, Any] = {device: kind.timed_event(device) for device, kind in accelerators_in_use()}

    def seconds_since(self, start: _Moment) -> float:
        """Kernels run after the call that queued them, so the clock of a device decides where both have one."""
        both = [(start.events[device], event) for device, event in self.events.items() if device in start.events]
        for _, event in both:
            event.synchronize()
        return max((began.elapsed_time(event) / 1000 for began, event in both), default=self.host - start.host)


class _OpenStage(Call):
    def __init__(self, name: str, depth: int) -> None:
        super().__init__()
        self.name = name
        self.depth = depth
        self.peaks = Peaks(0)
        self.start = _Moment()
        self.end: _Moment | None = None

    def add(self, peaks: Peaks) -> None:
        self.peaks = self.peaks.merged(peaks)

    def reading(self) -> StageReading:
        assert self.end is not None
        p = self.peaks
        seconds = self.end.seconds_since(self.start)
        return StageReading(
            self.name, self.depth, seconds, p.rss, p.anonymous, p.file, p.device, p.device_reserved, p.shared
        )


def _merged_by_name(readings: list[StageReading]) -> dict[tuple[int, str], list[StageReading]]:
    rows: dict[tuple[int, str], list[StageReading]] = {}
    for reading in readings:
        rows.setdefault((reading.depth, reading.name), []).append(reading)
    return rows


def _table(readings: list[StageReading], *, exact_rss: bool) -> Table:
    from rich import box
    from rich.table import Table

    with_device = any(reading.peak_device is not None for reading in readings)
    table = Table(box=box.SIMPLE, caption=_caption(readings, exact_rss=exact_rss), caption_justify="left")
    table.add_column("stage")
    for heading in ("seconds", "peak memory", "anonymous", "files", *(["on device"] if with_device else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for (depth, name), group in _merged_by_name(readings).items():
        repeated = f" ×{len(group)}" if len(group) > 1 else ""
        table.add_row("  " * depth + name + repeated, *_cells(group, with_device=with_device))
    outermost = [reading for reading in readings if reading.depth == 0]
    if len(outermost) > 1:
        table.add_section()
        table.add_row("all", *_cells(outermost, with_device=with_device))
    return table


def _cells(group: list[StageReading], *, with_device: bool) -> list[str]:
    columns = ["peak_rss", "peak_anonymous", "peak_file", *(["peak_device"] if with_device else [])]
    peaks = [[size for r in group if (size := getattr(r, column)) is not None] for column in columns]
    return [f"{sum(r.seconds for r in group):.2f}", *(format_decimal(max(p)) if p else "–" for p in peaks)]


def _caption(readings: list[StageReading], *, exact_rss: bool) -> str:
    rss = "Peak memory is exact (resident memory)" if exact_rss else "Peak memory is sampled (resident memory)"
    shared = any(reading.shared for reading in readings)
    both = " Another meter was open at the same time: peaks are those of both runs together." if shared else ""
    return f"{rss}; its parts are sampled.{both}"
