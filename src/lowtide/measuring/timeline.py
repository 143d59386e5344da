"""Memory over time: samples of a run and the stages that they fall in."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lowtide.forks import new_lock
from lowtide.measuring.peaks import Peaks, device_allocated

_MOST = 20_000


@dataclass(frozen=True)
class Sample:
    """Bytes in use at one moment, seconds since the start; `None` where this machine cannot tell."""

    seconds: float
    rss: int
    anonymous: int | None = None
    file: int | None = None
    device: int | None = None

    def merged(self, later: Sample) -> Sample:
        """One sample for both: of each kind the larger, at the moment of the larger memory."""
        when = max((self, later), key=lambda sample: sample.device if sample.device is not None else sample.rss).seconds
        parts = (_larger(getattr(self, name), getattr(later, name)) for name in ("anonymous", "file", "device"))
        return Sample(when, max(self.rss, later.rss), *parts)


@dataclass(frozen=True)
class StageMark:
    """When a stage began and ended, seconds since the start, and its exact peaks; `depth` is 0 for an outermost one."""

    name: str
    depth: int
    start: float
    end: float
    peak_rss: int
    peak_device: int | None = None


@dataclass(frozen=True)
class Timeline:
    """What a run's memory did: samples in the order of time, and stages in the order in which they began."""

    samples: tuple[Sample, ...]
    stages: tuple[StageMark, ...]

    @property
    def has_device(self) -> bool:
        """Whether an accelerator was in use at any time."""
        return any(sample.device is not None for sample in self.samples)


class Samples:
    """Keeps samples in bounded memory: when there are too many, neighbours are merged, and peaks stay."""

    def __init__(self, most: int = _MOST) -> None:
        self.begin = time.perf_counter()
        self._most = most
        self._lock = new_lock()
        self._samples: list[Sample] = []

    def add(self, peaks: Peaks) -> None:
        """Keep what is in use now."""
        now = time.perf_counter() - self.begin
        sample = Sample(now, peaks.rss, peaks.anonymous, peaks.file, device_allocated())
        with self._lock:
            self._samples.append(sample)
            if len(self._samples) > self._most:
                self._samples = _thinned(self._samples)

    def kept(self) -> tuple[Sample, ...]:
        """The samples so far, in the order of time."""
        with self._lock:
            return tuple(sorted(self._samples, key=lambda sample: sample.seconds))


def _thinned(samples: list[Sample]) -> list[Sample]:
    pairs = [first.merged(second) for first, second in zip(samples[::2], samples[1::2], strict=False)]
    return pairs + samples[len(pairs) * 2 :]


def _larger(first: int | None, second: int | None) -> int | None:
    return max((size for size in (first, second) if size is not None), default=None)
