"""Between requests and the processes that compute: each job is admitted, waits, and is run to its end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from PIL import Image

from lowtide.serve.admission import Admission, Bytes
from lowtide.serve.job import Job, State
from lowtide.serve.job_progress import Progress
from lowtide.serve.job_store import JobStore
from lowtide.serve.lanes import WORTH_A_START, Lane, Lanes, NotStartedError
from lowtide.serve.limits import Limits
from lowtide.serve.log_lines import REQUEST
from lowtide.serve.observer import Observer
from lowtide.serve.problems import ProblemError
from lowtide.serve.requests import CallRequest
from lowtide.serve.uploads import Uploads
from lowtide.serve.waiting import Waiting
from lowtide.serve.worker_handle import AskedError, WorkerDiedError, bytes_of

LOG = logging.getLogger("lowtide.serve")
SHARES = (1.0, 0.75, 0.5)
"""Shares of the budget for a job, by how often its process has died without progress."""
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
        self._progress: dict[str, Progress] = {}
        self._changed = asyncio.Condition()
        self._look = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._runs: set[asyncio.Task[None]] = set()
        self.is_draining = False

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
        for work in (self._keep_alive(), self._work(), self._watch_memory()):
            self._in_background(work)

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let the running jobs end within so many seconds, and stop. What waits stays kept."""
        self.is_draining = True
        await self._tell()
        if self._runs:
            await asyncio.wait(list(self._runs), timeout=seconds)
        await self.stop()

    async def stop(self) -> None:
        """End the processes that compute; a job that runs is begun again by the next server."""
        self.is_draining = True
        for task in (*self._tasks, *self._runs):
            task.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        self._progress.clear()
        await self._tell()
        await self.lanes.stop()

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
        job = Job(
            uuid.uuid4().hex, owner, self.admission.model(request.model), request.call(), request.seeds(), now, numbers,
            idempotency_key=key, request_id=REQUEST.get(), asked_as=asked_as,
            deadline=request.deadline and now + request.deadline,
        )  # fmt: skip
        try:
            job.pictures = await asyncio.to_thread(uploads.write, self.store.results(job.id))
            kept = await asyncio.to_thread(self.store.add, job)
        except OSError as error:
            raise ProblemError(507, f"The job cannot be kept: {error}.") from error
        if kept.id == job.id:
            self.observer.submitted(kept)
            self._wait(kept)
            await self._tell()
        return kept

    async def cancel(self, job: Job) -> Job:
        """End a job between its steps; one that has ended stays as it is."""
        lane = self.lanes.of(job.id)
        if (waiting := self.waiting.remove(job.id)) is not None:
            waiting.error = waiting.error or job.error
            await self._end(waiting, State.CANCELLED)
            return waiting
        if lane is not None and lane.job is not None:
            lane.job.error = job.error
            lane.worker.tell(do="cancel", id=job.id)
        return job

    async def watch(self, job: str) -> AsyncIterator[dict[str, Any]]:
        """A job's state and progress, whenever they change, until it ends."""
        seen: dict[str, Any] | None = None
        while True:
            now = self.now(job)
            if now is None:
                return
            if now != seen:
                seen = now
                yield now
            if State(now["state"]).is_end or self.is_left(job):
                return
            async with self._changed:
                if self.now(job) == seen:
                    await self._changed.wait()

    def now(self, job: str) -> dict[str, Any] | None:
        """A job's state and progress; None for one that is not known."""
        if job in self._progress:
            shown = self._progress[job].shown()
            return {"id": job, "state": State.RUNNING.value, **shown, "memory": self.memory}
        if (ahead := self.waiting.ahead_of(job)) is not None:
            return {"id": job, "state": State.QUEUED.value, "ahead": ahead}
        found = self.store.get(job)
        return None if found is None else {"id": job, "state": found.state.value, "error": found.error}

    def is_left(self, job: str) -> bool:
        """Whether a job that has not ended is left to the next server."""
        return self.is_draining and job not in self._progress

    def _check_open(self) -> None:
        if self.is_draining:
            raise ProblemError(
                503, "The server is ending and takes no new jobs.", {"Retry-After": "30"}, refusal="draining"
            )

    @property
    def seconds_left(self) -> float:
        """What all jobs that are here will take, as planned."""
        return max(1.0, self.waiting.seconds + sum(job.seconds for job in self.lanes.running))

    @property
    def _soonest(self) -> float:
        """Seconds until the first of the jobs that run will have ended."""
        left = (progress.seconds_left for progress in self._progress.values())
        return min((seconds for seconds in left if seconds is not None), default=math.inf)

    def _full(self) -> ProblemError:
        seconds = math.ceil(self.seconds_left)
        told = f"{len(self.waiting)} jobs wait, and no more may. Try again in {seconds} s."
        return ProblemError(429, told, {"Retry-After": str(seconds)}, seconds=seconds)

    # ---- running

    async def _keep_alive(self) -> None:
        await self.lanes.keep_alive()
        self.on_refusal()

    async def _watch_memory(self) -> None:
        while True:
            own = await asyncio.to_thread(lambda: bytes_of(os.getpid()) + self.lanes.bytes_now)
            self.memory = {"used": own, "budget": self.lanes.told.get("ram")}
            await self._tell()
            await asyncio.sleep(LOOKED)

    async def _work(self) -> None:
        while not self.is_draining:
            self._look.clear()
            while await self._begin_next():
                pass
            if not len(self.waiting):
                await self.lanes.end_idle()
            await self._look.wait()

    async def _begin_next(self) -> bool:
        """Begin the next job, if there is one that fits beside those that run."""
        job, lane = self.waiting.next(), self.lanes.free()
        if job is None or lane is None or self.is_draining:
            return False
        within: Bytes | None = None
        if self.lanes.running:
            if not lane.worker.started and self._soonest < WORTH_A_START:
                return False
            within = self.lanes.left_for(lane)
            try:
                plan = await self.admission.planned(job.model, job.call, self._sizes(job), within)
            except ProblemError:
                return False
            if not plan["fits"] or plan["exactness"] != job.plan["exactness"] or self.waiting.ahead_of(job.id) is None:
                return False
        self.waiting.take(job)
        await self.lanes.begin(lane, job, within or self.lanes.budgets)
        task = asyncio.create_task(self._run(lane, job, within))
        self._runs.add(task)
        task.add_done_callback(self._runs.discard)
        return True

    async def _run(self, lane: Lane, job: Job, within: Bytes | None) -> None:
        job.state, job.started, job.attempts = State.RUNNING, time.time(), job.attempts + 1
        progress = self._progress[job.id] = Progress(job)
        self.observer.began(job)
        await self._keep(job)
        await self._tell()

        def heard(message: dict[str, Any]) -> None:
            lane.held = message.get("needs") or lane.held
            progress.hear(message)
            self._in_background(self._tell())

        try:
            folder = self.store.results(job.id)
            folder.mkdir(parents=True, exist_ok=True)
            await self.lanes.ready(lane)
            answer = await lane.worker.ask(
                "run", key=job.id, heard=heard, model=job.model, call=job.call, seeds=job.seeds, folder=str(folder),
                pictures=job.pictures, share=SHARES[job.deaths], within=within, exactness=job.plan["exactness"],
            )  # fmt: skip
        except AskedError as error:
            cancelled = error.answer["kind"] == "cancelled"
            LOG.log(logging.INFO if cancelled else logging.ERROR, "%s", error.answer.get("where", error))
            if not cancelled:
                job.error = {"detail": str(error), "kind": error.answer["kind"]}
            await self._end(job, State.CANCELLED if cancelled else State.FAILED, lane)
        except OSError as error:
            job.error = {"detail": f"There is no place for its results: {error}", "kind": "disk"}
            await self._end(job, State.FAILED, lane)
        except WorkerDiedError as error:
            self.observer.died(job, str(error))
            await self._again_or_never(job, lane, error, made_progress=progress.made_progress)
        else:
            job.files, job.measured, job.taken = answer["files"], answer.get("measured"), answer.get("taken", [])
            await self._end(job, State.DONE, lane, answer)

    async def _again_or_never(self, job: Job, lane: Lane, error: WorkerDiedError, *, made_progress: bool) -> None:
        if not isinstance(error, NotStartedError):
            job.deaths = 1 if made_progress else job.deaths + 1
        lane.held = {}
        if job.deaths < len(SHARES):
            job.state = State.QUEUED
            await self._keep(job)
            self._leave(job, lane)
            self.waiting.add(job, first=True)
            await self._tell()
            return
        detail = f"{error} It was tried {job.deaths} times, each time in less memory."
        job.error = {"detail": detail, "kind": "died"}
        await self._end(job, State.FAILED, lane)

    async def _end(
        self, job: Job, state: State, lane: Lane | None = None, answer: dict[str, Any] | None = None
    ) -> None:
        job.state, job.ended = state, time.time()
        await self._keep(job)
        self.observer.ended(job, answer)
        self._leave(job, lane)
        await self._tell()

    def _leave(self, job: Job, lane: Lane | None) -> None:
        self._progress.pop(job.id, None)
        if lane is not None:
            self.lanes.leave(lane)

    async def _keep(self, job: Job) -> None:
        """Keep what has changed of a job; where the disk is full the work goes on, and a new server begins it again."""
        try:
            await asyncio.to_thread(self.store.keep, job)
        except OSError as error:
            LOG.error("job %s is %s, which cannot be kept: %s", job.id, job.state.value, error)

    def _wait(self, job: Job) -> None:
        self.waiting.add(job)
        self._look.set()
        if job.deadline is not None:
            self._in_background(self._end_at(job, job.deadline))

    async def _end_at(self, job: Job, deadline: float) -> None:
        await asyncio.sleep(max(0.0, deadline - time.time()))
        if not job.state.is_end:
            job.error = {"detail": "Its deadline had come.", "kind": "deadline"}
            await self.cancel(job)

    def _sizes(self, job: Job) -> dict[str, list[tuple[int, int]]]:
        return {name: [Image.open(file).size for file in files] for name, files in job.pictures.items()}

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        self._look.set()
        async with self._changed:
            self._changed.notify_all()
