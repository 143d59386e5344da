"""The process that computes: `python -m lowtide.serve.worker`, at the other end of a socket from the server.

One call runs at a time; plans are made beside it. When the server is gone this process ends at once: what was not
finished is begun again by the next server, with the same seeds.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from lowtide.serve.channel import Channel, Message


def main() -> None:
    """Serve messages until the server is gone. The arguments are a file descriptor and the engine's settings."""
    settings = json.loads(sys.argv[2])
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    worker = _Worker(channel)
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.work(settings)


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._runs: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._plans: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled: set[str] = set()

    def listen(self) -> None:
        """Sort messages as they come."""
        for message in self._channel.received():
            if message["do"] == "cancel":
                self._cancelled.add(message["id"])
            else:
                (self._runs if message["do"] == "run" else self._plans).put(message)
        os._exit(0)

    def work(self, settings: dict[str, Any]) -> None:
        """Import what is needed, then compute."""
        from lowtide.serve.engine import Engine

        try:
            self._engine = Engine(**settings)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            self._channel.send(event="refused", why=str(error))
            return
        budgets = self._engine.budgets
        self._channel.send(event="ready", budgets={"vram": budgets.vram, "ram": budgets.ram})
        threading.Thread(target=self._plan_all, daemon=True).start()
        while True:
            self._answer(self._runs.get(), self._run)

    def _plan_all(self) -> None:
        make = {"plan": self._plan, "about": self._about}
        while True:
            message = self._plans.get()
            self._answer(message, make[message["do"]])

    def _answer(self, message: Message, make: Any) -> None:
        try:
            answer = make(message)
        except BaseException as error:
            self._channel.send(id=message["id"], event="failed", **_said(error))
            if not isinstance(error, Exception):
                raise
        else:
            self._channel.send(id=message["id"], event="answer", **answer)

    def _plan(self, message: Message) -> dict[str, Any]:
        sizes = {name: [(width, height) for width, height in many] for name, many in message["sizes"].items()}
        return self._engine.plan(message["model"], message["call"], sizes, _budgets(message["within"]))

    def _about(self, message: Message) -> dict[str, Any]:
        return self._engine.about(message["model"])

    def _run(self, message: Message) -> dict[str, Any]:
        from lowtide.serve.engine import CancelledError
        from lowtide.serve.run_request import Along, Run

        job = message["id"]

        def told(**progress: Any) -> None:
            if job in self._cancelled:
                raise CancelledError(job)
            self._channel.send(id=job, event="progress", **progress)

        try:
            told(picture=0, step=0)
            run = Run(
                message["model"], message["call"], message["seeds"], Path(message["folder"]), message["pictures"],
                message["share"], _budgets(message["within"]), message["exactness"],
                message["together"], tuple(Along(texts, seeds, Path(at)) for texts, seeds, at in message["along"]),
            )  # fmt: skip
            return self._engine.run(run, told)
        finally:
            self._cancelled.discard(job)


def _budgets(content: dict[str, int | None] | None) -> Any:
    from lowtide.planning.plan import Budgets

    return None if content is None else Budgets(**content)


def _said(error: BaseException) -> dict[str, Any]:
    """What went wrong: `kind` tells what the caller can do about it."""
    from lowtide.planning.plan import BudgetError
    from lowtide.serve.engine import CancelledError, in_words

    if isinstance(error, CancelledError):
        return {"kind": "cancelled", "why": "The job was cancelled."}
    if isinstance(error, BudgetError):
        return {"kind": "budget", **in_words(error)}
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, ImportError)):
        return {"kind": "request", "why": str(error)}
    if isinstance(error, MemoryError):
        return {"kind": "memory", "why": str(error) or "Memory ran out."}
    return {"kind": "fault", "why": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}


if __name__ == "__main__":
    main()
