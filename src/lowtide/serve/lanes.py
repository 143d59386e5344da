"""The processes that compute: one always, and further ones while jobs that fit together run together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from lowtide.serve.admission import Bytes
from lowtide.serve.job import Job
from lowtide.serve.worker_handle import WorkerDiedError, WorkerHandle, bytes_of

PAUSE = 0.5
"""Seconds before a process that died is started anew, doubled each time it dies before it is ready."""
LONGEST_PAUSE = 30.0
MOST_FAILED_STARTS = 3
"""In a row, after which no further process is started."""
WORTH_A_START = 10.0
"""Seconds that a running job must still take for a further process to be started beside it."""


@dataclass(eq=False)
class Lane:
    """A process, the job that it runs, and the most memory that it may hold until its next one."""

    worker: WorkerHandle
    job: Job | None = None
    held: Bytes = field(default_factory=dict)


class Lanes:
    """At most `most` processes with the settings of `lowtide.serve.engine.Engine`, within its budgets together."""

    def __init__(self, settings: dict[str, Any], most: int = 1) -> None:
        self._settings, self._most = settings, most
        self.first = Lane(WorkerHandle(settings))
        self._lanes = [self.first]
        self._failed_starts = 0
        self._ended_starts = 0

    @property
    def running(self) -> list[Job]:
        """The jobs that run."""
        return [lane.job for lane in self._lanes if lane.job is not None]

    @property
    def bytes_now(self) -> int:
        """The resident memory of all processes."""
        return sum(bytes_of(lane.worker.process_id) for lane in self._lanes)

    @property
    def started(self) -> int:
        """How often a process was started."""
        return self._ended_starts + sum(lane.worker.started for lane in self._lanes)

    @property
    def budgets(self) -> Bytes:
        """The most bytes that all may hold together, as far as that is known."""
        return self.first.worker.budgets or {}

    @property
    def told(self) -> Bytes:
        """The budgets as they were given: the bytes of the server's own process count against them too."""
        given, ram = dict(self.budgets), self.budgets.get("ram")
        return given if ram is None else {**given, "ram": ram + int(self._settings.get("beside", 0))}

    def of(self, job: str) -> Lane | None:
        """The lane in which a job runs."""
        return next((lane for lane in self._lanes if lane.job is not None and lane.job.id == job), None)

    def free(self) -> Lane | None:
        """A lane for a further job: one that is there, else a new one, which is not started yet."""
        idle = next((lane for lane in self._lanes if lane.job is None), None)
        if idle is not None or len(self._lanes) >= self._most:
            return idle
        settings = {**self._settings, **self.budgets, "beside": 0}
        return Lane(WorkerHandle(settings))

    def left_for(self, lane: Lane) -> Bytes:
        """What the others leave of the budgets."""
        others = [each.held for each in self._lanes if each is not lane]
        return {
            kind: None if most is None else max(1, most - sum(held.get(kind) or 0 for held in others))
            for kind, most in self.budgets.items()
        }

    async def begin(self, lane: Lane, job: Job, held: Bytes) -> None:
        """Have a lane hold memory for a job; its process is started where it was not."""
        lane.job, lane.held = job, held
        if lane not in self._lanes:
            self._lanes.append(lane)
            await lane.worker.start()

    async def ready(self, lane: Lane) -> None:
        """Wait until a lane takes work; raises `WorkerDiedError` for a further process that died before."""
        while not lane.worker.is_ready:
            if lane is not self.first and lane.worker.process_id is None:
                self._failed_starts += 1
                if self._failed_starts >= MOST_FAILED_STARTS:
                    self._most = 1
                raise WorkerDiedError("A further process has died while it started.", by_others=True)
            await asyncio.sleep(0.05)
        self._failed_starts = 0

    def leave(self, lane: Lane) -> None:
        """Have a lane's job leave it. A further process that has died is not started again."""
        lane.job = None
        if lane is not self.first and lane.worker.process_id is None:
            self._lanes.remove(lane)

    async def end_idle(self) -> None:
        """End the processes that have nothing to do, but for the first."""
        for lane in [lane for lane in self._lanes[1:] if lane.job is None]:
            await lane.worker.stop()
            self._lanes.remove(lane)
            self._ended_starts += lane.worker.started

    async def keep_alive(self) -> None:
        """Start the first process, anew when it has died, until it says that it cannot work at all."""
        pause, worker = PAUSE, self.first.worker
        while worker.refusal is None:
            if worker.process_id is None:
                if worker.started:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                await worker.start()
            elif worker.is_ready:
                pause = PAUSE
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(lane.worker.stop() for lane in self._lanes))
