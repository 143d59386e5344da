"""Requests as JSON or as a form with files: OpenAI's clients send either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from lowtide.serve.limits import Limits
from lowtide.serve.problems import ProblemError
from lowtide.serve.uploads import Uploads

MOST_FILES = 16
PICTURES = {"image": "image", "mask": "mask_image"}
"""Arguments for the pictures of an edit, by their names in a request."""
M = TypeVar("M", bound=BaseModel)


async def read_request(http: Request, kind: type[M], pictures: Mapping[str, str], limits: Limits) -> tuple[M, Uploads]:
    """The content of a request, and the pictures in it; `pictures` tells for which argument those of a field are.

    Raises `ProblemError` for content of another type and for pictures that cannot be read, and
    `RequestValidationError` for fields that are not possible.
    """
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        try:
            return valid(kind, await http.json()), Uploads({})
        except (ValueError, RecursionError) as error:
            raise ProblemError(422, f"The body is no JSON: {error}.") from error
    if content_type not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ProblemError(415, "Send a form (multipart/form-data) or JSON (application/json).")
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    async with http.form(max_files=MOST_FILES, max_fields=100) as form:
        for written, value in form.multi_items():
            name = written.removesuffix("[]")
            if name not in pictures:
                fields[name] = value if isinstance(value, str) else "a file"
            elif isinstance(value, UploadFile):
                files.setdefault(pictures[name], []).append(await value.read())
            else:
                raise ProblemError(422, f"{name} must be a file: no path and no address is opened here.")
    return valid(kind, fields), await run_in_threadpool(Uploads.decoded, files, limits)


def body_of(kind: type[BaseModel], pictures: Mapping[str, str]) -> dict[str, Any]:
    """What the interface's description says of such a body."""
    schema = kind.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in pictures}
    with_files = {**schema, "properties": {**schema["properties"], **files}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": with_files}}
    return {"requestBody": {"required": True, "content": content}}


def valid(kind: type[M], content: Any) -> M:
    """A request of this kind; raises `RequestValidationError` for fields that are not possible."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors) from error
