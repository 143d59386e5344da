"""Pictures as OpenAI's interface asks for them, so that its clients work here."""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.job import State
from lowtide.serve.keys import Owner
from lowtide.serve.problems import ProblemError
from lowtide.serve.requests import CallRequest


class ImagesRequest(CallRequest):
    """A request for pictures. `size` is "512x512", or "auto" for the model's own; `user` is not looked at."""

    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png"] = "png"
    user: str | None = None

    def asked(self) -> CallRequest:
        """The same in our own words."""
        fields = self.model_dump(exclude={"size", "response_format", "output_format", "user"})
        if self.size != "auto":
            fields["width"], fields["height"] = map(int, self.size.split("x"))
        return CallRequest(**fields)


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes of pictures and models."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The models that can be asked."""
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "here"} for name in dispatcher.models],
        }

    @routes.post("/images/generations")
    async def generations(request: ImagesRequest, owner: Owner, http: Request) -> dict[str, Any]:
        """Make pictures, and answer when they are there; a caller who goes away cancels."""
        job = await dispatcher.submit(request.asked(), owner)
        async for _ in dispatcher.watch(job.id):
            if await http.is_disconnected():
                await dispatcher.cancel(job)
        done = dispatcher.store.get(job.id)
        assert done is not None
        if done.state is not State.DONE:
            raise ProblemError(500, (done.error or {}).get("detail", f"The job was {done.state.value}."), job=job.id)
        data: list[dict[str, str]] = []
        for place, name in enumerate(done.files):
            if request.response_format == "url":
                data.append({"url": f"{http.base_url}jobs/{job.id}/content/{place}"})
            else:
                content = (dispatcher.store.results(job.id) / name).read_bytes()
                data.append({"b64_json": base64.b64encode(content).decode()})
        return {"created": int(done.created), "data": data, "output_format": "png", "job": job.id, "seeds": done.seeds}

    return routes
