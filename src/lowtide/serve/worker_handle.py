"""The server's end of the process that computes: it is started, asked, and started anew when it has died."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lowtide.serve.channel import Message, encoded
from lowtide.serve.log_lines import relay

GROWTH = 64 * 10**6
"""Bytes that the server may grow by: requests, answers and pictures on their way."""

ENVELOPE = ("id", "event")
"""What of a message is for its way alone."""
Heard = Callable[[Message], None]


class WorkerDiedError(Exception):
    """The process that computes has died: of a signal, of memory that ran out, or of a fault.

    `by_others` tells that it was killed while memory was not running out, which is nothing that a job did.
    """

    def __init__(self, why: str, *, by_others: bool = False) -> None:
        super().__init__(why)
        self.by_others = by_others


class AskedError(Exception):
    """What was asked of the process that computes failed; `answer` has its `kind`, and `why` in words."""

    def __init__(self, answer: Message) -> None:
        super().__init__(answer["why"])
        self.answer = answer


class WorkerHandle:
    """One process that computes, with the settings of `lowtide.serve.engine.Engine`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._numbers = itertools.count()
        self._asked: dict[str, tuple[asyncio.Future[Message], Heard | None]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._is_ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._out_of_memory: int | None = None
        self.refusal: str | None = None
        """Why the process cannot work with these settings at all."""
        self.started = 0
        """How often the process was started."""
        self.budgets: dict[str, int | None] | None = None
        """The most bytes of each kind that it may take; None until it has said so."""

    @property
    def is_ready(self) -> bool:
        """Whether the process has begun to take work."""
        return self._is_ready.is_set()

    @property
    def process_id(self) -> int | None:
        """Of the process, while it is alive."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start the process; what is asked before it is ready waits."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lowtide.serve.worker", str(theirs.fileno()), json.dumps(self._settings),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                start_new_session=True, limit=2**20,
            )  # fmt: skip
        self.started += 1
        self._out_of_memory = kills_for_memory()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=2**24)
        assert self._process.stderr is not None
        for work in (self._listen(reader), relay(self._process.stderr)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._hear(json.loads(line))
        except OSError:
            pass
        self._is_ready.clear()
        assert self._process is not None
        await self._process.wait()
        asked, self._asked = self._asked, {}
        for answer, _ in asked.values():
            if not answer.done():
                answer.set_exception(_last_words(self._process.returncode, self._out_of_memory))

    def _hear(self, message: Message) -> None:
        if message["event"] == "ready":
            self.budgets = message["budgets"]
            self._is_ready.set()
            return
        if message["event"] == "refused":
            self.refusal = message["why"]
            return
        answer, heard = self._asked.get(message["id"], (None, None))
        if answer is None or answer.done():
            return
        if message["event"] == "progress":
            if heard is not None:
                heard(message)
        elif message["event"] == "failed":
            answer.set_exception(AskedError(message))
        else:
            answer.set_result(message)

    async def ask(self, do: str, *, key: str | None = None, heard: Heard | None = None, **content: Any) -> Message:
        """Ask, and wait for the answer; `heard` is told of the progress.

        Raises `AskedError` for what failed, and `WorkerDiedError` where the process has died.
        """
        if self.process_id is None:
            raise WorkerDiedError("The process that computes is not running.")
        key = key or f"question {next(self._numbers)}"
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[key] = answer, heard
        try:
            self.tell(do=do, id=key, **content)
            return {name: value for name, value in (await answer).items() if name not in ENVELOPE}
        finally:
            self._asked.pop(key, None)

    def tell(self, **message: Any) -> None:
        """Send a message without waiting for an answer."""
        if self._writer is not None:
            self._writer.write(encoded(message))

    async def wait_until_ready(self) -> None:
        """Return when the process takes work."""
        await self._is_ready.wait()

    async def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        if self._writer is not None:
            self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def bytes_of(process: int | None) -> int:
    """The resident memory of a process; 0 for one that is gone."""
    try:
        return 0 if process is None else int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def own_bytes() -> int:
    """What the server's own process takes of the machine's memory, with room for requests."""
    return int(psutil.Process().memory_info().rss) + GROWTH


def kills_for_memory() -> int | None:
    """How many processes Linux has killed on this machine because memory ran out; None where it does not say."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _last_words(code: int | None, kills_before: int | None) -> WorkerDiedError:
    if code is None or code >= 0:
        return WorkerDiedError(f"The process that computes ended with code {code}.")
    name, kills = signal.Signals(-code).name, kills_for_memory()
    if name != "SIGKILL":
        return WorkerDiedError(f"The process that computes was killed by {name}.")
    if kills is not None and kills == kills_before:
        return WorkerDiedError("The process that computes was killed by someone (SIGKILL).", by_others=True)
    return WorkerDiedError("The process that computes was killed by SIGKILL, as it is where memory runs out.")
