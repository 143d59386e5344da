"""The arithmetic of the table: medians, peaks, ratios, and the points that no other one beats."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowtide.bench.runs import Job, Reading, Run


@dataclass(frozen=True)
class Summary:
    """All readings of one job, and why the last run of it failed, if it did."""

    readings: tuple[Reading, ...]
    failure: str | None

    @property
    def latency(self) -> float | None:
        """The median, in seconds."""
        return statistics.median(self.latencies()) if self.readings else None

    @property
    def peak(self) -> int | None:
        """The largest peak of all runs, in bytes; `None` where there is none."""
        return self.largest("peak")

    def latencies(self) -> list[float]:
        """Seconds of each run."""
        return [reading.latency for reading in self.readings]

    def largest(self, name: str) -> int | None:
        """The largest value called `name` of all readings that have it."""
        return max((value for one in self.readings if (value := getattr(one, name)) is not None), default=None)


def summaries(runs: Iterable[Run]) -> dict[Job, Summary]:
    """What each job took, in the order of the first runs."""
    grouped: dict[Job, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.job, []).append(run)
    return {job: _summary(group) for job, group in grouped.items()}


def ratio(one: float | None, other: float | None) -> float | None:
    """`one` / `other`, or `None` where one of them is missing."""
    return None if one is None or not other else one / other


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of those points (x, y) that no other one beats in both, from the left to the right."""
    chosen: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not chosen or points[index][1] < points[chosen[-1]][1]:
            chosen.append(index)
    return chosen


def same_pictures(found: dict[Job, Summary], reference: Job) -> list[Job]:
    """The other jobs of the reference's library whose pictures are the reference's, byte for byte."""
    pictures = _checksums(found, reference)
    others = [job for job in found if job.library == reference.library and job != reference]
    return [job for job in others if len(pictures) == 1 and _checksums(found, job) == pictures]


def _checksums(found: dict[Job, Summary], job: Job) -> set[str]:
    return {reading.checksum for reading in found[job].readings} if job in found else set()


def _summary(runs: Sequence[Run]) -> Summary:
    readings = tuple(run.reading for run in runs if run.reading is not None)
    return Summary(readings, next((run.failure for run in runs if run.failure is not None), None))
