"""A job: what was asked, in which state it is, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

TEXTS = ("prompt", "negative_prompt")
"""Arguments in which pictures that one call makes may differ."""
FPS = 8
"""Frames a second of clips, as their published models make them."""


class State(StrEnum):
    """Of a job; the last three are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing comes after it."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass
class Job:
    """A job of an `owner`, such as the holder of a key.

    `call` are arguments of the pipeline's own call; there is a picture or a clip for each of the `seeds`. `plan` is
    what it will take, in bytes and seconds; once it is done, the plan that it ran under. `pictures` are files of
    arguments that are pictures. Times are seconds since 1970; it is ended at its `deadline`. `attempts` counts how
    often it was begun, `deaths` how often in a row the process that computes died of it without progress, and `kills`
    how often others killed that. It is to run `alone` where it did not fit beside others. `asked_as` is the interface
    that it came by, `request_id` the request, and `taken` what each stage took. Up to `together` pictures, of this job
    and of jobs like it, may be made by one call, the same up to rounding.
    """

    id: str
    owner: str
    model: str
    call: dict[str, Any]
    seeds: list[int]
    created: float
    plan: dict[str, Any] = field(default_factory=dict)
    state: State = State.QUEUED
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    deaths: int = 0
    kills: int = 0
    alone: bool = False
    files: list[str] = field(default_factory=list)
    measured: int | None = None
    error: dict[str, Any] | None = None
    idempotency_key: str | None = None
    request_id: str | None = None
    pictures: dict[str, list[str]] = field(default_factory=dict)
    deadline: float | None = None
    asked_as: str = "jobs"
    taken: list[dict[str, Any]] = field(default_factory=list)
    together: int = 1

    @property
    def seconds(self) -> float:
        """What the plan says that it takes."""
        return float(self.plan.get("seconds", 0.0)) * len(self.seeds)

    @property
    def texts(self) -> dict[str, str]:
        """Those arguments of its call that are texts."""
        return {name: value for name, value in self.call.items() if name in TEXTS}

    def is_like(self, other: Job) -> bool:
        """Whether one call can make pictures of both: they differ in texts and seeds alone."""
        mine, theirs = ((job.model, job.together, {**job.call, **dict.fromkeys(job.texts)}) for job in (self, other))
        return mine == theirs and not (self.pictures or other.pictures)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
