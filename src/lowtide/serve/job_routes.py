"""Jobs: plan, submit, look at, follow, cancel, and fetch what came of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.forms import PICTURES, body_of, read_request
from lowtide.serve.job import Job, State
from lowtide.serve.keys import Owner
from lowtide.serve.problems import ProblemError, types_of_answers
from lowtide.serve.requests import CallRequest

MOST_LISTED = 1000
TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes of jobs."""
    routes = APIRouter()

    @routes.post("/plan", openapi_extra=body_of(CallRequest, PICTURES))
    async def plan(http: Request) -> dict[str, Any]:
        """Whether a job would fit, and what it would take; nothing is run."""
        request, uploads = await read_request(http, CallRequest, PICTURES, dispatcher.limits)
        return await dispatcher.admission.told(request, uploads.sizes)

    @routes.get("/capabilities")
    async def capabilities() -> dict[str, Any]:
        """The budgets, the limits, and what each model makes and takes."""
        admission = dispatcher.admission
        models = [{"name": name, **await admission.about(name)} for name in admission.models]
        return {"budget": dispatcher.lanes.told, "limits": asdict(dispatcher.limits), "models": models}

    @routes.post("/jobs", status_code=202, openapi_extra=body_of(CallRequest, PICTURES))
    async def submit(
        http: Request, owner: Owner, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> dict[str, Any]:
        """Take a job. The same `Idempotency-Key` gives the same job."""
        request, uploads = await read_request(http, CallRequest, PICTURES, dispatcher.limits)
        return shown(await dispatcher.submit(request, owner, idempotency_key, uploads=uploads))

    @routes.get("/jobs")
    async def jobs(
        owner: Owner, state: State | None = None, most: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100
    ) -> dict[str, Any]:
        """Jobs, the newest first."""
        states = () if state is None else (state,)
        kept = dispatcher.store.jobs(*states, owner=owner, most=most)
        return {"jobs": [{**shown(job), "ahead": dispatcher.waiting.ahead_of(job.id)} for job in kept]}

    @routes.get("/jobs/{job}")
    async def job(job: str, owner: Owner) -> dict[str, Any]:
        """A job, its progress among it."""
        return {**shown(job_of(dispatcher, job, owner)), **(dispatcher.now(job) or {})}

    @routes.post("/jobs/{job}/cancel")
    async def cancel(job: str, owner: Owner) -> dict[str, Any]:
        """End a job between its steps."""
        return shown(await dispatcher.cancel(job_of(dispatcher, job, owner)))

    @routes.delete("/jobs/{job}", status_code=204)
    async def delete(job: str, owner: Owner) -> None:
        """Forget a job that has ended, and what came of it."""
        await delete_ended(dispatcher, job_of(dispatcher, job, owner))

    @routes.get(
        "/jobs/{job}/events", response_class=EventSourceResponse, responses=types_of_answers("text/event-stream")
    )
    async def events(job: str, owner: Owner) -> EventSourceResponse:
        """A job's state and progress as they change, until it ends."""
        job_of(dispatcher, job, owner)

        async def told() -> AsyncIterator[dict[str, str]]:
            async for now in dispatcher.watch(job):
                yield {"event": now["state"], "data": json.dumps(now)}

        return EventSourceResponse(told())

    @routes.get("/jobs/{job}/content/{place}", response_class=FileResponse, responses=types_of_answers(*TYPES.values()))
    async def content(job: str, place: int, owner: Owner) -> FileResponse:
        """A picture or clip of a job that is done."""
        return content_of(dispatcher, job_of(dispatcher, job, owner), place)

    @routes.get(
        "/jobs/{job}/given/{name}/{place}", response_class=FileResponse, responses=types_of_answers(TYPES[".png"])
    )
    async def given(job: str, name: str, place: int, owner: Owner) -> FileResponse:
        """A picture that came with a job."""
        files = job_of(dispatcher, job, owner).pictures.get(PICTURES.get(name, ""), [])
        if not 0 <= place < len(files):
            raise ProblemError(404, f"Job {job} has {len(files)} pictures as {name}.")
        return _sent(Path(files[place]), f"Picture {place} of job {job}")

    return routes


def job_of(dispatcher: Dispatcher, job: str, owner: str) -> Job:
    """A job of an owner; raises `ProblemError` where there is none."""
    kept = dispatcher.store.get(job)
    if kept is None or kept.owner != owner:
        raise ProblemError(404, f"There is no job {job!r}.")
    return kept


async def delete_ended(dispatcher: Dispatcher, job: Job) -> None:
    """Forget a job that has ended, and its files; raises `ProblemError` for one that has not."""
    if not job.state.is_end:
        raise ProblemError(409, f"Job {job.id} is {job.state.value}: cancel it before it is deleted.")
    await asyncio.to_thread(dispatcher.store.remove, job.id)


def content_of(dispatcher: Dispatcher, job: Job, place: int) -> FileResponse:
    """A result of a job; raises `ProblemError` where there is none."""
    if not 0 <= place < len(job.files):
        raise ProblemError(404, f"Job {job.id} is {job.state.value} and has {len(job.files)} results.")
    return _sent(dispatcher.store.results(job.id) / job.files[place], f"Result {place} of job {job.id}")


def _sent(path: Path, name: str) -> FileResponse:
    if not path.is_file():
        raise ProblemError(410, f"{name} is gone.")
    return FileResponse(path, media_type=TYPES[path.suffix])


def shown(job: Job) -> dict[str, Any]:
    """A job as its owner sees it."""
    content = job.to_dict()
    for name in ("owner", "pictures", "asked_as"):
        del content[name]
    given = {
        name: [f"/jobs/{job.id}/given/{name}/{place}" for place in range(len(job.pictures.get(argument, [])))]
        for name, argument in PICTURES.items()
    }
    return {
        **content,
        "content": [f"/jobs/{job.id}/content/{place}" for place in range(len(job.files))],
        "given": {name: addresses for name, addresses in given.items() if addresses},
    }
