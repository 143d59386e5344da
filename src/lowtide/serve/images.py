"""Pictures as OpenAI's interface asks for them, so that its clients work here."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import Field
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.forms import PICTURES, body_of, read_request, valid
from lowtide.serve.job import Job, State
from lowtide.serve.keys import Owner
from lowtide.serve.problems import ProblemError, types_of_answers
from lowtide.serve.requests import CallRequest, SizedRequest

NOT_OURS = {"response_format", "output_format", "output_compression", "stream", "partial_images"}
NOT_LOOKED_AT = {"user", "quality", "style", "background", "moderation", "input_fidelity"}


class ImagesRequest(SizedRequest):
    """A request for pictures. `size` is "512x512", or "auto" for the model's own.

    With `stream` events come instead of an answer, so many of them small previews. What is in `NOT_LOOKED_AT` is taken
    and has no effect.
    """

    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None

    def asked(self) -> CallRequest:
        """The same in our own words."""
        return valid(CallRequest, self.fields_without(*NOT_OURS, *NOT_LOOKED_AT))


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes of pictures and models."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [_model(name) for name in dispatcher.models]}

    @routes.get("/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        """A model that can be asked."""
        return _model(dispatcher.admission.model(model))

    @routes.post("/images/generations", response_model=None, responses=types_of_answers("text/event-stream"))
    async def generations(request: ImagesRequest, owner: Owner, http: Request) -> Response:
        """Make pictures, and answer when they are there; a caller who goes away cancels."""
        job = await dispatcher.submit(request.asked(), owner, asked_as="images")
        return await _answer(dispatcher, job, request, http, "image_generation")

    @routes.post(
        "/images/edits",
        response_model=None,
        responses=types_of_answers("text/event-stream"),
        openapi_extra=body_of(ImagesRequest, PICTURES),
    )
    async def edits(owner: Owner, http: Request) -> Response:
        """Make pictures from a picture (`image`), and within a `mask` where its transparent part is."""
        request, uploads = await read_request(http, ImagesRequest, PICTURES, dispatcher.limits)
        if "image" not in uploads.sizes:
            raise ProblemError(422, "image: a picture to start from is needed, as a file of the form.")
        job = await dispatcher.submit(request.asked(), owner, uploads=uploads, asked_as="images")
        return await _answer(dispatcher, job, request, http, "image_edit")

    return routes


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "here"}


async def _answer(dispatcher: Dispatcher, job: Job, request: ImagesRequest, http: Request, kind: str) -> Response:
    if request.stream:
        return EventSourceResponse(_events(dispatcher, job, request, kind))
    async for _ in dispatcher.watch(job.id):
        if await http.is_disconnected():
            await dispatcher.cancel(job)
    if dispatcher.is_left(job.id):  # nobody would fetch it
        await dispatcher.cancel(job)
    done = _done(dispatcher, job)
    data: list[dict[str, str]] = []
    for place, content in enumerate(_contents(dispatcher, done, request)):
        if request.response_format == "url":
            data.append({"url": f"{http.base_url}jobs/{job.id}/content/{place}"})
        else:
            data.append({"b64_json": await run_in_threadpool(content)})
    return JSONResponse(
        {
            "created": int(done.created),
            "data": data,
            "output_format": request.output_format,
            "job": job.id,
            "seeds": done.seeds,
        }
    )


async def _events(dispatcher: Dispatcher, job: Job, request: ImagesRequest, kind: str) -> AsyncIterator[dict[str, str]]:
    told = 0
    try:
        async for now in dispatcher.watch(job.id):
            due = (now.get("step") or 0) / (now.get("steps") or 1) * (request.partial_images + 1) >= told + 1
            if due and told < request.partial_images and now.get("preview"):
                yield _event(f"{kind}.partial_image", b64_json=now["preview"], partial_image_index=told)
                told += 1
        done = _done(dispatcher, job)
        for encode in _contents(dispatcher, done, request):
            content = await run_in_threadpool(encode)
            yield _event(f"{kind}.completed", b64_json=content, created_at=int(done.created), job=job.id)
    except ProblemError as error:
        yield _event("error", message=error.detail, code=str(error.status), param=None)
    finally:  # who goes away cancels
        await dispatcher.cancel(job)


def _event(kind: str, **content: Any) -> dict[str, str]:
    return {"event": kind, "data": json.dumps({"type": kind, **content})}


def _done(dispatcher: Dispatcher, job: Job) -> Job:
    done = dispatcher.store.get(job.id)
    if done is not None and done.state is not State.DONE and dispatcher.is_draining:
        raise ProblemError(503, "The server is ending. Ask again.", {"Retry-After": "30"}, refusal="draining")
    if done is None or done.state is not State.DONE:
        state = "deleted" if done is None else done.state.value
        error = (done and done.error) or {}
        raise ProblemError(500, error.get("detail", f"The job was {state}."), job=job.id)
    return done


def _contents(dispatcher: Dispatcher, job: Job, request: ImagesRequest) -> list[Callable[[], str]]:
    folder = dispatcher.store.results(job.id)

    def encoded(path: Path) -> str:
        content = path.read_bytes()
        if request.output_format != "png":
            again = io.BytesIO()
            picture = Image.open(path).convert("RGB")
            picture.save(again, format=request.output_format, quality=request.output_compression)
            content = again.getvalue()
        return base64.b64encode(content).decode()

    return [lambda path=folder / name: encoded(path) for name in job.files]
