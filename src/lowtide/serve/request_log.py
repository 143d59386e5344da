"""Around every request: an id, a line in the log, figures, a span; and an answer where the server has a fault."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowtide.serve.log_lines import LOG, belongs_to, request_id, say
from lowtide.serve.observer import Observer
from lowtide.serve.problems import REFUSAL, problem

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
GONE = 499
"""In place of a status, where who asked went away before there was an answer."""
PROBES = {"/healthz", "/readyz", "/metrics"}
"""Routes that are asked every few seconds: where all is well, only a debugging log has them."""
REASONS = {
    401: "key", 404: "not there", 405: "method", 409: "state", 410: "not there", 411: "body", 413: "body",
    422: "invalid", 429: "queue full", 503: "not ready", 507: "disk",
}  # fmt: skip
"""Why a request was refused, by its status, where the refusal itself does not say."""


class RequestLog:
    """Gives each request an id, its own `X-Request-ID` if that is fit for a log, and tells of it when it has ended.

    Prompts, keys, addresses and paths with ids are told nowhere.
    """

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begin, status = Headers(scope=scope), time.perf_counter(), GONE
        request = request_id(headers.get("x-request-id"))
        belongs_to(request=request, job=None)

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request
            await send(message)

        with self._observer.spans.request(headers) as span:
            try:
                await self._app(scope, receive, with_id)
            except Exception as error:
                LOG.exception("A fault of the server")
                if status != GONE:
                    raise  # the answer has begun: the connection is closed in the middle of it
                await problem(500, f"A fault of the server: {type(error).__name__}. Its log has more.")(
                    scope, receive, with_id
                )
            finally:
                method, route = _method(scope), _route(scope)
                span.named(f"{method} {route}", **{"http.response.status_code": status, "lowtide.request": request})
                self._tell(scope, method, route, status, time.perf_counter() - begin)

    def _tell(self, scope: Scope, method: str, route: str, status: int, seconds: float) -> None:
        self._observer.measures.answered(route, method, status, seconds)
        reason = _reason(scope, status)
        if reason is not None:
            self._observer.measures.refused(reason)
        say(
            _level(route, status), f"{method} {route} {status}", method=method,
            route=route, status=status, ms=round(1000 * seconds, 1), owner=_state(scope).get("owner"), refused=reason,
        )  # fmt: skip


def _level(route: str, status: int) -> int:
    if 500 <= status != 503:
        return logging.WARNING
    return logging.DEBUG if route in PROBES and status == 200 else logging.INFO


def _reason(scope: Scope, status: int) -> str | None:
    return _state(scope).get(REFUSAL, REASONS.get(status)) if status >= 400 else None


def _state(scope: Scope) -> dict[str, Any]:
    return scope.get("state", {})


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else "other"


def _route(scope: Scope) -> str:
    """The template of the path, as /jobs/{job}; what leads nowhere is one."""
    return getattr(scope.get("route"), "path", "other")
