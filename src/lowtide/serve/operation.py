"""For who keeps the server running: is it alive, does it take work, and what has it done."""

from __future__ import annotations

import asyncio
import os

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.problems import ProblemError
from lowtide.serve.worker_handle import bytes_of


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes that need no key."""
    routes = APIRouter()

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether the process that computes takes work."""
        if dispatcher.is_draining:
            raise ProblemError(503, "The server is ending.", {"Retry-After": "30"})
        if not dispatcher.worker.is_ready:
            raise ProblemError(503, "The process that computes is starting.", {"Retry-After": "5"})
        return {"status": "ready"}

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
    async def metrics() -> Response:
        """Figures in Prometheus' format."""
        text = dispatcher.observer.measures.text(
            await asyncio.to_thread(dispatcher.store.counts),
            len(dispatcher.waiting), dispatcher.waiting.seconds, dispatcher.lanes.started,
            {"server": bytes_of(os.getpid()), "workers": dispatcher.lanes.bytes_now},
        )  # fmt: skip
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return routes
