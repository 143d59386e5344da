"""Clips as OpenAI's interface asks for them: jobs that are looked at until they are done."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import Field

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.forms import body_of, read_request, valid
from lowtide.serve.job import FPS, Job, State
from lowtide.serve.job_routes import TYPES, content_of, delete_ended, job_of
from lowtide.serve.keys import Owner
from lowtide.serve.problems import ProblemError, types_of_answers
from lowtide.serve.requests import CallRequest, SizedRequest

REFERENCE = {"input_reference": "image"}
"""The argument for the picture that a clip begins with, by its name in a request."""
LONGEST = 120
"""Seconds of a clip."""
STATES = {
    State.QUEUED: "queued",
    State.RUNNING: "in_progress",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",
}


class VideoRequest(SizedRequest):
    """A request for a clip of so many `seconds`, or `num_frames`; `size` is "480x720", width and height."""

    seconds: int | None = Field(None, ge=1, le=LONGEST)
    n: Literal[1] = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def asked(self) -> CallRequest:
        """The same in our own words."""
        fields = self.fields_without("seconds")
        if self.seconds is not None:
            fields["num_frames"] = self.seconds * FPS + 1
        return valid(CallRequest, fields)


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes of clips."""
    routes = APIRouter(prefix="/v1/videos")

    @routes.post("", openapi_extra=body_of(VideoRequest, REFERENCE))
    async def create(owner: Owner, http: Request) -> dict[str, Any]:
        """Take a job for a clip, from a picture (`input_reference`) where the model begins with one."""
        request, uploads = await read_request(http, VideoRequest, REFERENCE, dispatcher.limits)
        model = dispatcher.admission.model(request.model)
        if (await dispatcher.admission.about(model))["makes"] != "clips":
            raise ProblemError(422, f"{model} makes pictures: ask /v1/images/generations.")
        return _shown(dispatcher, await dispatcher.submit(request.asked(), owner, uploads=uploads, asked_as="videos"))

    @routes.get("")
    async def videos(owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        """The clips that were asked for, the newest first."""
        jobs = dispatcher.store.jobs(owner=owner, asked_as="videos", most=limit + 1)
        data = [_shown(dispatcher, job) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}

    @routes.get("/{video}")
    async def video(video: str, owner: Owner) -> dict[str, Any]:
        """How far a clip is."""
        return _shown(dispatcher, job_of(dispatcher, video, owner))

    @routes.get("/{video}/content", response_class=FileResponse, responses=types_of_answers(*TYPES.values()))
    async def content(video: str, owner: Owner, variant: Literal["video"] = "video") -> FileResponse:
        """The clip (MP4)."""
        return content_of(dispatcher, job_of(dispatcher, video, owner), 0)

    @routes.delete("/{video}")
    async def delete(video: str, owner: Owner) -> dict[str, Any]:
        """Forget a clip that has ended."""
        await delete_ended(dispatcher, job_of(dispatcher, video, owner))
        return {"id": video, "object": "video.deleted", "deleted": True}

    return routes


def _shown(dispatcher: Dispatcher, job: Job) -> dict[str, Any]:
    now = dispatcher.now(job.id) or {}
    state = State(now.get("state", job.state))
    steps = now.get("steps") or 0
    frames = job.call.get("num_frames")
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": STATES[state],
        "progress": 100 if state is State.DONE else int(100 * now.get("step", 0) / steps) if steps else 0,
        "created_at": int(job.created),
        "completed_at": None if job.ended is None else int(job.ended),
        "expires_at": None,
        "size": f"{job.call['width']}x{job.call['height']}" if "width" in job.call else "auto",
        "seconds": "auto" if frames is None else str(max(1, round((frames - 1) / FPS))),
        "prompt": job.call["prompt"],
        "remixed_from_video_id": None,
        "error": _error(job, state),
    }


def _error(job: Job, state: State) -> dict[str, str] | None:
    if state not in (State.FAILED, State.CANCELLED):
        return None
    error = job.error or {"kind": state.value, "detail": f"The job was {state.value}."}
    return {"code": error["kind"], "message": error["detail"]}
