"""For who keeps the server running: is it alive, does it take work, and what has it done."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.job import State
from lowtide.serve.problems import ProblemError


def router(dispatcher: Dispatcher) -> APIRouter:
    """The routes that need no key."""
    routes = APIRouter()
    registry = CollectorRegistry()
    jobs = Gauge("lowtide_jobs", "Jobs that are kept, by state.", ["state"], registry=registry)
    waiting = Gauge("lowtide_waiting_seconds", "What the jobs that wait will take, as planned.", registry=registry)
    starts = Gauge("lowtide_worker_starts", "How often the process that computes was started.", registry=registry)

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether the process that computes takes work."""
        if not dispatcher.worker.is_ready:
            raise ProblemError(503, "The process that computes is starting.", {"Retry-After": "5"})
        return {"status": "ready"}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' format."""
        for state in State:
            jobs.labels(state.value).set(len(dispatcher.store.jobs(state)))
        waiting.set(dispatcher.waiting.seconds)
        starts.set(dispatcher.worker.started)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes
