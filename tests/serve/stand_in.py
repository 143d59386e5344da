"""An application in this process whose jobs are made by no model: a stand-in for the process that computes."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import uvicorn
from PIL import Image

from lowtide.serve.application import make_app
from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.draining import DrainingServer
from lowtide.serve.job_store import JobStore
from lowtide.serve.lanes import Lanes
from lowtide.serve.limits import Limits
from lowtide.serve.observer import Observer
from lowtide.serve.worker_handle import AskedError, WorkerHandle

ABOUT = {
    "kind": "StableDiffusionPipeline", "makes": "pictures", "defaults": {}, "size": {"width": 128, "height": 128},
    "arguments": ["prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "sampler"],
    "samplers": ["ddim"], "planned_by": ["width", "height", "num_inference_steps"],
}  # fmt: skip
STAGE = {
    "name": "denoise", "predicted_peak": 400, "peak": 390, "predicted_seconds": 2.0, "seconds": 3.0, "moved": 70,
    "stalled": 0.5,
}  # fmt: skip


class StandIn(WorkerHandle):
    """Makes grey pictures in `pause` seconds a step; more than 512 x 512 pixels do not fit."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__({})
        self.pause, self.budgets = pause, {"vram": None, "ram": 10**9}
        self.cancelled: set[str] = set()
        self.fault: Exception | None = None
        self.along: dict[str, list[str]] = {}
        """What was asked to be made along, by jobs."""

    @property
    def process_id(self) -> int | None:
        return 0 if self.started else None

    async def start(self) -> None:
        self.started += 1
        self._is_ready.set()

    async def stop(self) -> None:
        self._is_ready.clear()

    def tell(self, **message: Any) -> None:
        self.cancelled.add(message["id"])

    async def ask(self, do: str, *, key: str | None = None, heard: Any = None, **content: Any) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        if do == "about":
            return ABOUT
        if do == "plan":
            return _plan(content["call"])
        return await self._run(str(key), heard, content)

    async def _run(self, job: str, heard: Any, content: dict[str, Any]) -> dict[str, Any]:
        steps = content["call"].get("num_inference_steps", 2)
        self.along[job] = [Path(folder).name for _, _, folder in content["along"]]
        names = [f"{place}.png" for place in range(len(content["seeds"]))]
        for place, name in enumerate(names):
            for step in range(steps):
                await asyncio.sleep(self.pause)
                if job in self.cancelled:
                    raise AskedError({"kind": "cancelled", "why": "The job was cancelled."})
                heard({"id": job, "picture": place, "step": step + 1, "steps": steps})
            Image.new("RGB", (8, 8)).save(Path(content["folder"]) / name)
        return {**_plan(content["call"]), "files": names, "measured": 450, "taken": [STAGE]}


def _plan(call: dict[str, Any]) -> dict[str, Any]:
    if call.get("width", 0) * call.get("height", 0) > 512 * 512:
        return {"fits": False, "why": "Too little memory.", "minimum": {"vram": None, "ram": 10**10}}
    needs = {"vram": None, "ram": 500}
    return {"fits": True, "peak": 500, "needs": needs, "seconds": 2.0, "exactness": "equal bits", "plan": "a plan"}


def stand_in_app(
    data: Path, *, pause: float = 0.0, keys: tuple[str, ...] = (), limits: Limits | None = None,
    observer: Observer | None = None,
) -> tuple[Any, Dispatcher]:  # fmt: skip
    """An application and its dispatcher."""
    lanes = Lanes({})
    lanes.first.worker = StandIn(pause)
    dispatcher = Dispatcher(JobStore(data), lanes, ["seascapes"], limits or Limits(), observer)
    return make_app(dispatcher, keys), dispatcher


class Serving:
    """An application at a free port of this machine, served by a thread, until the block ends."""

    def __init__(self, app: Any, dispatcher: Dispatcher, drain_seconds: float = 5.0) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, access_log=False)
        self.server = DrainingServer(config, dispatcher, drain_seconds)
        self.dispatcher = dispatcher
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Self:
        self._thread.start()
        until = time.monotonic() + 30
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.dispatcher.store.close()

    def end(self) -> None:
        """As a SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def wait(self) -> None:
        """Return when it has ended."""
        self._thread.join(30)
        assert not self._thread.is_alive()

    def ask(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, and answer, read as JSON if it is that."""
        body = None if content is None else json.dumps(content).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, body, named, method=method)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, _read(answer)
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.headers, _read(answer)


def _read(answer: Any) -> Any:
    body = answer.read()
    return json.loads(body) if body and "json" in answer.headers.get("Content-Type", "") else body
