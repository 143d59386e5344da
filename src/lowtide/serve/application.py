"""The application: what is asked over HTTP, and who may ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response

import lowtide
from lowtide.serve import images, job_routes, operation, problems
from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.keys import owner
from lowtide.serve.problems import problem

DRAINED = 16
"""Bodies of up to so many times the bytes that are possible are read to their end before they are refused."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(dispatcher: Dispatcher, keys: tuple[str, ...] = ()) -> FastAPI:
    """The application of a dispatcher, which it starts and stops; with `keys` each request must hold one."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await dispatcher.start()
        yield
        await dispatcher.stop()

    app = FastAPI(title="Lowtide", version=lowtide.__version__, lifespan=life, docs_url=None, redoc_url=None)
    problems.install(app)
    app.state.keys = keys
    app.include_router(operation.router(dispatcher))
    for routes in (job_routes, images):
        app.include_router(routes.router(dispatcher), dependencies=[Depends(owner)])
    app.middleware("http")(_guarded(dispatcher.limits.body))
    return app


def _guarded(most: int) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        has_body = request.method not in ("GET", "HEAD", "DELETE", "OPTIONS")
        if "transfer-encoding" in request.headers and has_body:
            answer: Response = problem(411, "Say how long the body is: send Content-Length.")
        elif not length.isdigit() or int(length) > most:
            if length.isdigit() and int(length) <= DRAINED * most:  # else who sends it hears nothing but a broken pipe
                async for _ in request.stream():
                    pass
            answer = problem(413, f"A body may have {most} bytes here.")
        else:
            answer = await call(request)
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    return guarded
