"""The jobs that wait: how many may, and whose is next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container

from lowtide.serve.job import Job


class Waiting:
    """A bounded queue that is fair to owners: next is the first job of who was given the fewest seconds so far."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._jobs: list[Job] = []
        self._given: defaultdict[str, float] = defaultdict(float)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def is_full(self) -> bool:
        """Whether no further job may wait."""
        return len(self._jobs) >= self.most

    @property
    def seconds(self) -> float:
        """What all jobs that wait will take, as planned."""
        return sum(job.seconds for job in self._jobs)

    def add(self, job: Job, *, first: bool = False) -> None:
        """Have a job wait; `first` is for one that was begun before."""
        if job.owner not in self._given:  # who comes new has no claim on what others were given before
            self._given[job.owner] = min((self._given[each.owner] for each in self._jobs), default=0.0)
        self._jobs.insert(0 if first else len(self._jobs), job)

    def next(self, but: Container[str] = ()) -> Job | None:
        """The job whose turn it is: one that was begun before, else of the owner who was given the least.

        The ids in `but` are passed over.
        """
        jobs = [job for job in self._jobs if job.id not in but]
        if not jobs:
            return None
        return jobs[0] if jobs[0].attempts > 0 else min(jobs, key=lambda job: self._given[job.owner])

    def like(self, job: Job, but: Container[str] = ()) -> list[Job]:
        """The first of the jobs whose pictures can be made by the same calls as a job's, as many as may be."""
        found, pictures = list[Job](), len(job.seeds)
        for each in self._jobs:
            if pictures < job.together and each.id not in but and each is not job and each.is_like(job):
                found.append(each)
                pictures += len(each.seeds)
        return found

    def take(self, job: Job) -> None:
        """Give a job its turn; it waits no longer."""
        self._jobs.remove(job)
        self._given[job.owner] += job.seconds

    def ahead_of(self, job: str) -> int | None:
        """How many jobs came before one that waits; None if it does not."""
        return next((place for place, each in enumerate(self._jobs) if each.id == job), None)

    def remove(self, job: str) -> Job | None:
        """Have a job wait no longer; None if it does not."""
        found = next((each for each in self._jobs if each.id == job), None)
        if found is not None:
            self._jobs.remove(found)
        return found
