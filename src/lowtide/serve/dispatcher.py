"""Between requests and the process that computes: each job is planned, admitted, waits, and is run to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from lowtide.serve.job import Job, State
from lowtide.serve.job_store import JobStore
from lowtide.serve.limits import Limits
from lowtide.serve.problems import ProblemError
from lowtide.serve.requests import CallRequest
from lowtide.serve.waiting import Waiting
from lowtide.serve.worker_handle import AskedError, WorkerDiedError, WorkerHandle

LOG = logging.getLogger("lowtide.serve")
SHARES = (1.0, 0.75, 0.5)
"""Shares of the budget for a job, by how often its process has died."""
SMALLER = (0.75, 0.5, 0.25)
"""Of a picture's sides that do not fit, the shares that are tried to say what would."""
PAUSE = 0.5
"""Seconds before a process that died is started anew, doubled each time it dies before it is ready."""
LONGEST_PAUSE = 30.0


class Dispatcher:
    """Runs the jobs of a store, one at a time, by one process that computes; `models` are the names it knows.

    `on_refusal` is called where that process cannot work at all.
    """

    def __init__(self, store: JobStore, worker: WorkerHandle, models: list[str], limits: Limits) -> None:
        self.store, self.worker, self.models, self.limits = store, worker, models, limits
        self.waiting = Waiting(limits.queued)
        self.running: Job | None = None
        self.progress: dict[str, dict[str, Any]] = {}
        self._plans: dict[Any, dict[str, Any]] = {}
        self._names: dict[str, list[str]] = {}
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
        self._is_draining = False
        self.on_refusal: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Take up the jobs that were not ended by an earlier server, begun ones first, and begin to work."""
        left = await asyncio.to_thread(self.store.jobs, State.QUEUED, State.RUNNING)
        for job in sorted(left, key=lambda job: (job.state is not State.RUNNING, job.created)):
            job.state = State.QUEUED
            self.waiting.add(job)
        self._tasks = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._work())]

    async def stop(self) -> None:
        """Begin nothing new, let the running job end, and end the process that computes."""
        self._is_draining = True
        async with self._changed:
            self._changed.notify_all()
        if self.worker.refusal is not None:
            self._tasks[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tasks[1]
        self._tasks[0].cancel()
        await self.worker.stop()

    # ---- what requests ask

    async def plan(self, request: CallRequest) -> dict[str, Any]:
        """What a request would take; see `lowtide.serve.engine.Engine.plan`. Raises `ProblemError`."""
        request.check(self.limits)
        model, call = self._model(request), request.call()
        key = model, tuple(sorted((name, value) for name, value in call.items() if "prompt" not in name))
        if key not in self._plans:
            await self._check_names(model, call)
            self._plans[key] = await self._asked("plan", model=model, call=call)
        return self._plans[key]

    async def submit(self, request: CallRequest, owner: str, key: str | None = None) -> Job:
        """Take a job that fits; raises `ProblemError` for one that never will, and where too many wait."""
        plan = await self.plan(request)
        if not plan["fits"]:
            raise await self._refusal(request, plan)
        if self.waiting.is_full:
            seconds = math.ceil(self._seconds_left())
            raise ProblemError(
                429, f"{len(self.waiting)} jobs wait, and no more may. Try again in {seconds} s.",
                {"Retry-After": str(seconds)}, seconds=seconds,
            )  # fmt: skip
        numbers = {name: plan[name] for name in ("peak", "seconds", "exactness", "plan")}
        job = Job(
            uuid.uuid4().hex, owner, self._model(request), request.call(), request.seeds(), time.time(), numbers,
            idempotency_key=key,
        )  # fmt: skip
        try:
            kept = await asyncio.to_thread(self.store.add, job)
        except OSError as error:
            raise ProblemError(507, f"The job cannot be kept: {error}.") from error
        if kept.id == job.id:
            self.waiting.add(kept)
            await self._tell()
        return kept

    async def cancel(self, job: Job) -> Job:
        """End a job between its steps; one that has ended stays as it is."""
        if self.waiting.remove(job.id) is not None:
            await self._end(job, State.CANCELLED)
        elif self.running is not None and self.running.id == job.id:
            self.worker.tell(do="cancel", id=job.id)
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
            if State(now["state"]).is_end:
                return
            async with self._changed:
                if self.now(job) == seen:
                    await self._changed.wait()

    def now(self, job: str) -> dict[str, Any] | None:
        """A job's state and progress; None for one that is not known."""
        if self.running is not None and self.running.id == job:
            return {"id": job, "state": State.RUNNING.value, **self.progress.get(job, {})}
        found = self.store.get(job)
        return None if found is None else {"id": job, "state": found.state.value, "error": found.error}

    # ---- planning

    def _model(self, request: CallRequest) -> str:
        if request.model is None:
            return self.models[0]
        if request.model not in self.models:
            raise ProblemError(404, f"There is no model {request.model!r} here.", possible=self.models)
        return request.model

    async def _check_names(self, model: str, call: dict[str, Any]) -> None:
        if model not in self._names:  # the source of its library is read for them
            self._names[model] = sorted((await self._asked("names", model=model))["names"])
        unknown = sorted(set(call) - set(self._names[model]))
        if unknown:
            raise ProblemError(422, f"{model} takes no {', '.join(unknown)}.", possible=self._names[model])

    async def _asked(self, do: str, **content: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self.limits.planning):
                await self.worker.wait_until_ready()
                return await self.worker.ask(do, **content)
        except AskedError as error:
            status = 422 if error.answer["kind"] in ("request", "budget") else 500
            raise ProblemError(status, str(error)) from error
        except (WorkerDiedError, TimeoutError) as error:
            reason = str(error) or "The process that computes is busy or starting."
            raise ProblemError(503, f"{reason} Try again.", {"Retry-After": "5"}) from error

    async def _refusal(self, request: CallRequest, plan: dict[str, Any]) -> ProblemError:
        more: dict[str, Any] = {"minimum": plan["minimum"]}
        for share in SMALLER if request.width and request.height else ():
            sides = {"width": _side(request.width, share), "height": _side(request.height, share)}
            try:
                if (await self.plan(request.model_copy(update=sides)))["fits"]:
                    more["possible"] = sides
                    break
            except ProblemError:
                continue
        return ProblemError(422, plan["why"], **more)

    def _seconds_left(self) -> float:
        return max(1.0, self.waiting.seconds + (0.0 if self.running is None else self.running.seconds))

    # ---- running

    async def _keep_alive(self) -> None:
        pause = PAUSE
        while self.worker.refusal is None:
            if self.worker.process_id is None:
                if self.worker.started:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                await self.worker.start()
            elif self.worker.is_ready:
                pause = PAUSE
            await asyncio.sleep(0.05)
        self.on_refusal()

    async def _work(self) -> None:
        while not self._is_draining:
            job = self.waiting.take()
            if job is None:
                async with self._changed:
                    if not len(self.waiting) and not self._is_draining:
                        await self._changed.wait()
                continue
            await self._run(job)

    async def _run(self, job: Job) -> None:
        job.state, job.started, job.attempts = State.RUNNING, time.time(), job.attempts + 1
        self.running = job
        await self._keep(job)
        await self._tell()
        try:
            folder = self.store.results(job.id)
            folder.mkdir(parents=True, exist_ok=True)
            await self.worker.wait_until_ready()
            answer = await self.worker.ask(
                "run", key=job.id, heard=self._heard, model=job.model, call=job.call, seeds=job.seeds,
                folder=str(folder), share=SHARES[job.deaths],
            )  # fmt: skip
        except AskedError as error:
            cancelled = error.answer["kind"] == "cancelled"
            LOG.log(logging.INFO if cancelled else logging.ERROR, "job %s: %s", job.id, error)
            job.error = None if cancelled else {"detail": str(error), "kind": error.answer["kind"]}
            await self._end(job, State.CANCELLED if cancelled else State.FAILED)
        except OSError as error:
            job.error = {"detail": f"There is no place for its results: {error}", "kind": "disk"}
            await self._end(job, State.FAILED)
        except WorkerDiedError as error:
            LOG.warning("job %s, attempt %d: %s", job.id, job.attempts, error)
            await self._again_or_never(job, error)
        else:
            job.files, job.measured = answer["files"], answer["measured"]
            await self._end(job, State.DONE)

    async def _again_or_never(self, job: Job, error: WorkerDiedError) -> None:
        job.deaths += 1
        if job.deaths < len(SHARES):
            job.state = State.QUEUED
            await self._keep(job)
            self.running = None
            self.waiting.add(job, first=True)
            return
        detail = f"{error} It was tried {job.deaths} times, each time in less memory."
        job.error = {"detail": detail, "kind": "died"}
        await self._end(job, State.FAILED)

    async def _end(self, job: Job, state: State) -> None:
        job.state, job.ended = state, time.time()
        await self._keep(job)
        self.progress.pop(job.id, None)
        if self.running is job:
            self.running = None
        await self._tell()

    async def _keep(self, job: Job) -> None:
        """Keep what has changed of a job; where the disk is full the work goes on, and a new server begins it again."""
        try:
            await asyncio.to_thread(self.store.keep, job)
        except OSError as error:
            LOG.error("job %s is %s, which cannot be kept: %s", job.id, job.state.value, error)

    def _heard(self, message: dict[str, Any]) -> None:
        self.progress[message["id"]] = {"picture": message["picture"], "step": message["step"]}
        telling = asyncio.get_running_loop().create_task(self._tell())
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _side(side: int | None, share: float) -> int:
    assert side is not None
    return max(8, int(side * share) // 8 * 8)
