"""The application: what is asked over HTTP, and who may ask it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lowtide
from lowtide.serve import images, job_routes, operation, page_routes, problems, videos
from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.keys import owner
from lowtide.serve.limits import Limits
from lowtide.serve.problems import declared, problem
from lowtide.serve.request_log import RequestLog
from lowtide.serve.retention import Retention

DRAINED = 16
"""Bodies of up to so many times the bytes that are possible are read to their end before they are refused."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(dispatcher: Dispatcher, keys: tuple[str, ...] = (), retention: Retention | None = None) -> FastAPI:
    """The application of a dispatcher, which it starts and stops; with `keys` each request must hold one.

    What has ended is kept as long as `retention` says.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await dispatcher.start()
        sweeping = asyncio.create_task((retention or Retention()).keep_up(dispatcher.store))
        yield
        sweeping.cancel()
        await dispatcher.stop()

    app = FastAPI(title="Lowtide", version=lowtide.__version__, lifespan=life, docs_url=None, redoc_url=None)
    problems.install(app)
    app.state.keys = keys
    app.include_router(page_routes.router())
    app.include_router(operation.router(dispatcher), responses=declared(411, 413, 503))
    refusals = declared(400, 401, 404, 409, 410, 411, 413, 415, 422, 429, 500, 503, 507)
    for routes in (job_routes, images, videos):
        app.include_router(routes.router(dispatcher), dependencies=[Depends(owner)], responses=refusals)
    app.add_middleware(Guard, limits=dispatcher.limits)
    app.add_middleware(RequestLog, observer=dispatcher.observer)
    return app


class Guard:
    """Refuses bodies that are too long before they are read, and sets `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = await self._refusal(Headers(scope=scope), receive)
        await (refused or self._app)(scope, receive, with_headers)

    async def _refusal(self, headers: Headers, receive: Receive) -> Response | None:
        if "transfer-encoding" in headers:
            return problem(411, "Say how long the body is: send Content-Length.")
        is_form = headers.get("content-type", "").startswith("multipart/form-data")
        most = self._limits.upload if is_form else self._limits.body
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) <= most:
            return None
        if length.isdigit() and int(length) <= DRAINED * most:  # else who sends it hears of a broken pipe alone
            while (await receive()).get("more_body", False):
                pass
        return problem(413, f"A body may have {most} bytes here.")
