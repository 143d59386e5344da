"""The runs of a table: its options, what one run is to do, what it measured, and the order of the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowtide.bench.techniques import OURS, TECHNIQUES


@dataclass(frozen=True)
class Job:
    """One technique, by its name, in one library."""

    technique: str
    library: str


@dataclass(frozen=True)
class Spec:
    """What one run is to do, as it is sent to the process of the run; `folder` is an empty folder on disk."""

    library: str
    technique: str
    model: str
    variant: str | None
    device: str
    dtype: str
    width: int
    height: int
    steps: int
    batch: int
    prompt: str
    seed: int
    folder: str


@dataclass(frozen=True)
class Reading:
    """What one run took, in seconds and bytes; `None` where this machine cannot measure a figure.

    `peak_rss` is the peak of the whole process from its start, imports and loading included; those of the device are
    of the timed call alone. `checksum` is of the pictures' bytes. `gpu` is the name of the GPU, if one computed.
    """

    load: float
    apply: float
    latency: float
    peak_rss: int | None
    device_allocated: int | None
    device_reserved: int | None
    checksum: str
    gpu: str | None
    versions: dict[str, str]

    @property
    def peak(self) -> int | None:
        """The peak that the table shows: of GPU memory if a GPU computed, otherwise of the process."""
        return self.peak_rss if self.device_allocated is None else self.device_allocated


@dataclass(frozen=True)
class Run:
    """One run that has ended, with its reading or the reason why there is none; rounds count from 1."""

    round: int
    job: Job
    reading: Reading | None
    failure: str | None


@dataclass(frozen=True)
class Options:
    """The options of a table; `half` is the name of the dtype of all rows but `original`, `timeout` is in seconds."""

    model: str
    variant: str | None
    device: str
    half: str
    width: int
    height: int
    steps: int
    batch: int
    prompt: str
    rounds: int
    rows: tuple[str, ...]
    peer: str | None
    seed: int
    timeout: float | None
    out: Path

    def jobs(self) -> list[Job]:
        """The jobs of one round: for each row ours, and the peer's if there is a peer that has the technique."""
        libraries = [OURS] if self.peer is None else [OURS, self.peer]
        return [
            Job(row, library) for row in self.rows for library in libraries if library == OURS or TECHNIQUES[row].peer
        ]

    def spec(self, job: Job, folder: str) -> Spec:
        """What the run of a job is to do."""
        dtype = self.half if TECHNIQUES[job.technique].precision == "half" else "float32"
        return Spec(
            library=job.library,
            technique=job.technique,
            model=self.model,
            variant=self.variant,
            device=self.device,
            dtype=dtype,
            width=self.width,
            height=self.height,
            steps=self.steps,
            batch=self.batch,
            prompt=self.prompt,
            seed=self.seed,
            folder=folder,
        )


Outcome = tuple[Reading | None, str | None]


def in_turn(
    jobs: list[Job], rounds: int, run_one: Callable[[Job], Outcome], round_ended: Callable[[], object]
) -> Iterator[Run]:
    """Run every job once in each round, so that slow changes of the machine's speed affect all jobs alike.

    A job that failed is not tried again. `round_ended` is called after each round.
    """
    failed: set[Job] = set()
    for number in range(1, rounds + 1):
        for job in jobs:
            if job in failed:
                continue
            reading, failure = run_one(job)
            if failure is not None:
                failed.add(job)
            yield Run(number, job, reading, failure)
        round_ended()
