"""Jobs on their way: who is next, in which process, and what becomes of a job whose process dies."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

from PIL import Image

from lowtide.serve.admission import Admission, Bytes
from lowtide.serve.changes import Changes
from lowtide.serve.job import Job, State
from lowtide.serve.job_progress import Progress
from lowtide.serve.job_store import JobStore
from lowtide.serve.lanes import WORTH_A_START, Lane, Lanes
from lowtide.serve.observer import Observer
from lowtide.serve.problems import ProblemError
from lowtide.serve.waiting import Waiting
from lowtide.serve.worker_handle import AskedError, WorkerDiedError

LOG = logging.getLogger("lowtide.serve")
SHARES = (1.0, 0.75, 0.5)
"""Shares of the budget for a job, by how often its process has died without progress."""
MOST_KILLS = 20
"""Times in a row, without progress, that a job's process is killed by others before the job has failed."""


class Runs:
    """Runs the jobs that wait, each to its end; `changes` are told of all that happens to them."""

    def __init__(
        self, store: JobStore, lanes: Lanes, waiting: Waiting, admission: Admission, observer: Observer,
        changes: Changes,
    ) -> None:  # fmt: skip
        self._store, self._lanes, self._waiting, self._admission = store, lanes, waiting, admission
        self._observer, self._changes = observer, changes
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress: dict[str, Progress] = {}
        self._along: set[str] = set()  # waiting jobs of which a running one makes pictures with its own
        self.is_draining = False

    async def work(self) -> None:
        """Begin jobs as there is room for them, until nothing new is to begin."""
        while not self.is_draining:
            number = self._changes.number
            while await self._begin_next():
                pass
            if not len(self._waiting):
                await self._lanes.end_idle()
            await self._changes.after(number)

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, and wait so long for what runs."""
        self.is_draining = True
        self._changes.tell()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=seconds)

    async def stop(self) -> None:
        """Leave what runs to the next server."""
        self.is_draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.progress.clear()
        self._changes.tell()

    def cancel(self, job: Job) -> None:
        """End a job that runs between its steps."""
        lane = self._lanes.of(job.id)
        if lane is not None and lane.job is not None:
            lane.job.error = job.error
            self.progress[job.id].is_cancelled = True
            lane.worker.tell(do="cancel", id=job.id)

    @property
    def _soonest(self) -> float:
        """Seconds until the first of the jobs that run will have ended."""
        left = (progress.seconds_left for progress in self.progress.values())
        return min((seconds for seconds in left if seconds is not None), default=math.inf)

    async def _begin_next(self) -> bool:
        """Begin the next job, if there is one that fits beside those that run."""
        job, lane = self._waiting.next(but=self._along), self._lanes.free()
        if job is None or lane is None or self.is_draining:
            return False
        within: Bytes | None = None
        if self._lanes.running:
            if job.alone or (not lane.worker.started and self._soonest < WORTH_A_START):
                return False
            within = self._lanes.left_for(lane)
            try:
                plan = await self._admission.planned(job.model, job.call, _sizes(job), within)
            except ProblemError:
                return False
            if not plan["fits"] or plan["exactness"] != job.plan["exactness"] or self._waiting.ahead_of(job.id) is None:
                return False
        self._waiting.take(job)
        await self._lanes.begin(lane, job, within or self._lanes.budgets)
        task = asyncio.create_task(self._run(lane, job, within))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _run(self, lane: Lane, job: Job, within: Bytes | None) -> None:
        job.state, job.started, job.attempts = State.RUNNING, time.time(), job.attempts + 1
        progress = self.progress[job.id] = Progress(job)
        along = self._waiting.like(job, but=self._along)
        self._along |= {each.id for each in along}
        self._observer.began(job)
        await self._keep(job)
        self._changes.tell()

        def heard(message: dict[str, Any]) -> None:
            lane.held = message.get("needs") or lane.held
            progress.hear(message)
            self._changes.tell()

        try:
            folder = self._store.results(job.id)
            folder.mkdir(parents=True, exist_ok=True)
            await self._lanes.ready(lane)
            if progress.is_cancelled:
                await self.end(job, State.CANCELLED, lane)
                return
            answer = await lane.worker.ask(
                "run", key=job.id, heard=heard, model=job.model, call=job.call, seeds=job.seeds, folder=str(folder),
                pictures=job.pictures, share=SHARES[job.deaths], within=within,
                exactness=None if job.together > 1 else job.plan["exactness"], together=job.together,
                along=[[each.texts, each.seeds, str(self._store.results(each.id))] for each in along],
            )  # fmt: skip
        except AskedError as error:
            if error.answer["kind"] == "budget" and within is not None:
                await self._wait_again(job, lane, alone=True)
                return
            cancelled = error.answer["kind"] == "cancelled"
            LOG.log(logging.INFO if cancelled else logging.ERROR, "%s", error.answer.get("where", error))
            if not cancelled:
                job.error = {"detail": str(error), "kind": error.answer["kind"]}
            await self.end(job, State.CANCELLED if cancelled else State.FAILED, lane)
        except OSError as error:
            job.error = {"detail": f"There is no place for its results: {error}", "kind": "disk"}
            await self.end(job, State.FAILED, lane)
        except WorkerDiedError as error:
            self._observer.died(job, str(error))
            await self._again_or_never(job, lane, error, made_progress=progress.made_progress)
        else:
            told = ("peak", "plan") if job.together > 1 else ("peak", "plan", "exactness")
            job.plan |= {name: answer[name] for name in told if name in answer}
            job.files, job.measured, job.taken = answer["files"], answer.get("measured"), answer.get("taken", [])
            await self.end(job, State.DONE, lane, answer)
        finally:
            self._along -= {each.id for each in along}
            self._changes.tell()

    async def _again_or_never(self, job: Job, lane: Lane, error: WorkerDiedError, *, made_progress: bool) -> None:
        if self.progress[job.id].is_cancelled:
            await self.end(job, State.CANCELLED, lane)
            return
        if made_progress:
            job.deaths = job.kills = 0
        if error.by_others:
            job.kills += 1
        else:
            job.deaths += 1
        if job.deaths < len(SHARES) and job.kills < MOST_KILLS:
            await self._wait_again(job, lane)
            return
        detail = f"{error} It was tried {job.deaths + job.kills} times without any progress."
        job.error = {"detail": detail, "kind": "died"}
        await self.end(job, State.FAILED, lane)

    async def _wait_again(self, job: Job, lane: Lane, *, alone: bool = False) -> None:
        """Have a job wait for its next attempt, which runs `alone` if this one could not beside others."""
        job.state, job.alone = State.QUEUED, alone
        await self._keep(job)
        self._leave(job, lane)
        self._waiting.add(job, first=True)
        self._changes.tell()

    async def end(self, job: Job, state: State, lane: Lane | None = None, answer: dict[str, Any] | None = None) -> None:
        """Have a job be in a state that is an end."""
        job.state, job.ended = state, time.time()
        await self._keep(job)
        await asyncio.to_thread(self._store.forget_unfinished, job.id)
        self._observer.ended(job, answer)
        self._leave(job, lane)
        self._changes.tell()

    def _leave(self, job: Job, lane: Lane | None) -> None:
        self.progress.pop(job.id, None)
        if lane is not None:
            self._lanes.leave(lane)

    async def _keep(self, job: Job) -> None:
        """Keep what has changed of a job; where the disk is full the work goes on, and a new server begins it again."""
        try:
            await asyncio.to_thread(self._store.keep, job)
        except OSError as error:
            LOG.error("job %s is %s, which cannot be kept: %s", job.id, job.state.value, error)


def _sizes(job: Job) -> dict[str, list[tuple[int, int]]]:
    return {name: [Image.open(file).size for file in files] for name, files in job.pictures.items()}
