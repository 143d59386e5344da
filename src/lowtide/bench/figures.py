"""The arithmetic of the table: medians, peaks, ratios, and the points that no other point beats."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowtide.bench.runs import Job, Reading, Run


@dataclass(frozen=True)
class Summary:
    """All readings of one job, and the reason why a run of it failed, if one did."""

    readings: tuple[Reading, ...]
    failure: str | None

    @property
    def latency(self) -> float | None:
        """The median in seconds; `None` without readings."""
        return statistics.median(self.latencies()) if self.readings else None

    @property
    def peak(self) -> int | None:
        """The largest peak of all runs, in bytes; `None` if no run has one."""
        return self.largest("peak")

    def latencies(self) -> list[float]:
        """Seconds of each run."""
        return [reading.latency for reading in self.readings]

    def largest(self, name: str) -> int | None:
        """The largest value of the field `name` in all readings; `None` if no reading has one."""
        return max((value for reading in self.readings if (value := getattr(reading, name)) is not None), default=None)


def summaries(runs: Iterable[Run]) -> dict[Job, Summary]:
    """The summary of each job, in the order of their first runs."""
    grouped: dict[Job, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.job, []).append(run)
    return {job: _summary(group) for job, group in grouped.items()}


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """`numerator` / `denominator`; `None` if one of them is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (x, y) that no other point beats in both x and y, from left to right."""
    chosen: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not chosen or points[index][1] < points[chosen[-1]][1]:
            chosen.append(index)
    return chosen


def same_pictures(by_job: dict[Job, Summary], reference: Job) -> list[Job]:
    """The other jobs of the same library whose pictures equal those of `reference`, byte for byte."""
    pictures = _checksums(by_job, reference)
    others = [job for job in by_job if job.library == reference.library and job != reference]
    return [job for job in others if len(pictures) == 1 and _checksums(by_job, job) == pictures]


def _checksums(by_job: dict[Job, Summary], job: Job) -> set[str]:
    return {reading.checksum for reading in by_job[job].readings} if job in by_job else set()


def _summary(runs: Sequence[Run]) -> Summary:
    readings = tuple(run.reading for run in runs if run.reading is not None)
    return Summary(readings, next((run.failure for run in runs if run.failure is not None), None))
