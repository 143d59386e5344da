"""Lines of the log: text for people or JSON for machines, each with the request and the job that it belongs to."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from typing import Any

LOG = logging.getLogger("lowtide.serve")
VALID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
"""Ids of requests that are taken over from who asks."""
REQUEST: ContextVar[str | None] = ContextVar("request", default=None)
JOB: ContextVar[str | None] = ContextVar("job", default=None)


def request_id(given: str | None) -> str:
    """The id of a request: the one given if it is fit for a log, else a new one."""
    return given if given is not None and VALID.fullmatch(given) else uuid.uuid4().hex


def belongs_to(*, request: str | None, job: str | None) -> None:
    """Have the lines that this task writes from now on belong to a request and a job."""
    REQUEST.set(request)
    JOB.set(job)


def say(level: int, message: str, **fields: Any) -> None:
    """Write a line with further fields. Prompts and keys are in no line."""
    LOG.log(level, message, extra={"fields": fields})


def configure(*, as_json: bool, level: str) -> None:
    """Have all lines of this process go to stderr in one form, those of the server and of uvicorn from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("lowtide", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


async def relay(lines: asyncio.StreamReader) -> None:
    """Write what another process says, line by line, until it has ended; lines that are far too long are left out."""
    while True:
        try:
            line = await lines.readline()
        except ValueError:
            continue
        if not line:
            return
        logging.getLogger("lowtide.serve.worker").info("%s", line.decode(errors="replace").rstrip())


class JsonLines(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as an object: time, level, logger, message, and fields."""
        content = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class TextLines(logging.Formatter):
    """Time, level, message, and fields behind it; control characters of what others sent are written as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line; an exception follows on its own lines."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower()}: {record.getMessage()}" + (f" [{fields}]" if fields else "")
        line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    belongs = {"request": REQUEST.get(), "job": JOB.get()} | getattr(record, "fields", {})
    return {name: value for name, value in belongs.items() if value is not None}


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"
