"""Errors as RFC 9457 has them: what was asked, what is possible, and what to try."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
REFUSAL = "refusal"
"""Where a request's state says why it was refused, for the figures."""


class ProblemError(Exception):
    """An answer that says why a request is refused; `more` are further members of the problem.

    `refusal` is the reason in two words for the figures, where the status alone does not say it.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        headers: dict[str, str] | None = None,
        *,
        refusal: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, headers or {}, more
        self.refusal = refusal


class Problem(BaseModel):
    """An error: what was asked, what is possible, and what to try."""

    type: str
    title: str
    status: int
    detail: str
    error: dict[str, Any]


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Problems with these statuses, for the description of a route."""
    schema = Problem.model_json_schema()
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def types_of_answers(*types: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers where it is no JSON."""
    return {200: {"content": {each: {"schema": {"type": "string", "format": "binary"}} for each in types}}}


def install(app: FastAPI) -> None:
    """Have every error of an application be a problem."""
    app.add_exception_handler(ProblemError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_a_fault)


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """The answer; `error` repeats it in the form that clients of OpenAI's interface look for."""
    title = HTTPStatus(status).phrase
    error = {"message": detail, "type": title.lower().replace(" ", "_"), "code": status}
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail, **more, "error": error}
    return JSONResponse(content, status, headers, MEDIA_TYPE)


async def _of_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    if error.refusal is not None:
        request.scope.setdefault("state", {})[REFUSAL] = error.refusal
    return problem(error.status, error.detail, error.headers, **error.more)


async def _of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    wrong = [
        f"{'.'.join(map(str, each['loc'][1:])) or 'the body'}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors()
    ]
    return problem(422, "; ".join(wrong) + ".")


async def _of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _of_a_fault(_: Request, error: Exception) -> JSONResponse:
    return problem(500, f"A fault of the server: {type(error).__name__}. Its log has more.")
