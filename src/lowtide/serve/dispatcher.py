"""Between requests and the processes that compute: each job is admitted, waits, and can be followed to its end."""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from lowtide.planning.plan import EQUAL_BITS, UP_TO_ROUNDING
from lowtide.serve.admission import Admission
from lowtide.serve.changes import Changes
from lowtide.serve.job import Job, State
from lowtide.serve.job_runs import Runs
from lowtide.serve.job_store import JobStore
from lowtide.serve.lanes import Lanes
from lowtide.serve.limits import Limits
from lowtide.serve.log_lines import REQUEST
from lowtide.serve.observer import Observer
from lowtide.serve.problems import ProblemError
from lowtide.serve.requests import CallRequest
from lowtide.serve.uploads import Uploads
from lowtide.serve.waiting import Waiting
from lowtide.serve.worker_handle import bytes_of

LOOKED = 0.5
"""Seconds between two looks at the memory in use."""


class Dispatcher:
    """Runs the jobs of a store; `models` are the names that the processes of `lanes` know.

    `on_refusal` is called where these cannot work at all.
    """

    def __init__(
        self, store: JobStore, lanes: Lanes, models: list[str], limits: Limits, observer: Observer | None = None
    ) -> None:
        self.store, self.lanes, self.limits = store, lanes, limits
        self.observer = observer or Observer()
        self.worker = lanes.first.worker
        self.admission = Admission(self.worker, models, limits, self.observer.planning)
        self.waiting = Waiting(limits.queued)
        self.memory: dict[str, int | None] = {}
        self.on_refusal: Callable[[], None] = lambda: None
        self._changes = Changes()
        self._runs = Runs(store, lanes, self.waiting, self.admission, self.observer, self._changes)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return self.admission.models

    async def start(self) -> None:
        """Take up the jobs that were not ended by an earlier server, begun ones first, and begin to work."""
        left = await asyncio.to_thread(self.store.jobs, State.QUEUED, State.RUNNING)
        for job in sorted(left, key=lambda job: (job.state is not State.RUNNING, job.created)):
            job.state = State.QUEUED
            self._wait(job)
        for work in (self._keep_alive(), self._runs.work(), self._watch_memory()):
            self._in_background(work)

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let the running jobs end within so many seconds, and stop. What waits stays kept."""
        await self._runs.drain(seconds)
        await self.stop()

    async def stop(self) -> None:
        """End the processes that compute; a job that runs is begun again by the next server."""
        for task in self._tasks:
            task.cancel()
        await self._runs.stop()
        await self.lanes.stop()

    @property
    def is_draining(self) -> bool:
        """Whether nothing new begins, since the server ends."""
        return self._runs.is_draining

    # ---- what requests ask

    async def submit(
        self, request: CallRequest, owner: str, key: str | None = None, *, uploads: Uploads | None = None,
        asked_as: str = "jobs",
    ) -> Job:  # fmt: skip
        """Take a job that fits; raises `ProblemError` for one that never will, and where too many wait."""
        self._check_open()
        uploads = uploads or Uploads({})
        plan = await self.admission.told(request, uploads.sizes)
        if not plan["fits"]:
            more = {name: plan[name] for name in ("minimum", "possible") if name in plan}
            raise ProblemError(422, plan["why"], refusal="never fits", **more)
        seconds = plan["seconds"] * request.n
        if request.deadline is not None and seconds > request.deadline:
            raise ProblemError(
                422, f"It takes about {math.ceil(seconds)} s, and its deadline is in {request.deadline:g} s.",
                refusal="deadline", seconds=seconds,
            )  # fmt: skip
        if self.waiting.is_full:
            raise self._full()
        now = time.time()
        numbers = {name: plan[name] for name in ("peak", "seconds", "exactness", "plan")}
        together = 1 if uploads.sizes else self.limits.together
        if together > 1 and plan["exactness"] == EQUAL_BITS:
            numbers["exactness"] = UP_TO_ROUNDING
        job = Job(
            uuid.uuid4().hex, owner, self.admission.model(request.model), request.call(), request.seeds(), now, numbers,
            idempotency_key=key, request_id=REQUEST.get(), asked_as=asked_as,
            deadline=request.deadline and now + request.deadline, together=together,
        )  # fmt: skip
        try:
            job.pictures = await asyncio.to_thread(uploads.write, self.store.results(job.id))
            kept = await asyncio.to_thread(self.store.add, job)
        except OSError as error:
            raise ProblemError(507, f"The job cannot be kept: {error}.") from error
        if kept.id == job.id:
            self.observer.submitted(kept)
            self._wait(kept)
        return kept

    async def cancel(self, job: Job) -> Job:
        """End a job between its steps; one that has ended stays as it is."""
        waiting = self.waiting.remove(job.id)
        if waiting is None:
            self._runs.cancel(job)
            return job
        waiting.error = waiting.error or job.error
        await self._runs.end(waiting, State.CANCELLED)
        return waiting

    async def watch(self, job: str) -> AsyncIterator[dict[str, Any]]:
        """A job's state and progress, whenever they change, until it ends."""
        seen: dict[str, Any] | None = None
        while True:
            number, now = self._changes.number, self.now(job)
            if now is None:
                return
            if now != seen:
                seen = now
                yield now
            if State(now["state"]).is_end or self.is_left(job):
                return
            await self._changes.after(number)

    def now(self, job: str) -> dict[str, Any] | None:
        """A job's state and progress; None for one that is not known."""
        if job in self._runs.progress:
            shown = self._runs.progress[job].shown()
            return {"id": job, "state": State.RUNNING.value, **shown, "memory": self.memory}
        if (ahead := self.waiting.ahead_of(job)) is not None:
            return {"id": job, "state": State.QUEUED.value, "ahead": ahead}
        found = self.store.get(job)
        return None if found is None else {"id": job, "state": found.state.value, "error": found.error}

    def is_left(self, job: str) -> bool:
        """Whether a job that has not ended is left to the next server."""
        return self.is_draining and job not in self._runs.progress

    def _check_open(self) -> None:
        if self.is_draining:
            raise ProblemError(
                503, "The server is ending and takes no new jobs.", {"Retry-After": "30"}, refusal="draining"
            )

    @property
    def seconds_left(self) -> float:
        """What all jobs that are here will take, as planned."""
        return max(1.0, self.waiting.seconds + sum(job.seconds for job in self.lanes.running))

    def _full(self) -> ProblemError:
        seconds = math.ceil(self.seconds_left)
        told = f"{len(self.waiting)} jobs wait, and no more may. Try again in {seconds} s."
        return ProblemError(429, told, {"Retry-After": str(seconds)}, seconds=seconds)

    # ---- beside requests

    async def _keep_alive(self) -> None:
        await self.lanes.keep_alive()
        self.on_refusal()

    async def _watch_memory(self) -> None:
        while True:
            own = await asyncio.to_thread(lambda: bytes_of(os.getpid()) + self.lanes.bytes_now)
            self.memory = {"used": own, "budget": self.lanes.told.get("ram")}
            self._changes.tell()
            await asyncio.sleep(LOOKED)

    def _wait(self, job: Job) -> None:
        self.waiting.add(job)
        self._changes.tell()
        if job.deadline is not None:
            self._in_background(self._end_at(job, job.deadline))

    async def _end_at(self, job: Job, deadline: float) -> None:
        await asyncio.sleep(max(0.0, deadline - time.time()))
        if not job.state.is_end:
            job.error = {"detail": "Its deadline had come.", "kind": "deadline"}
            await self.cancel(job)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
