"""A server in a process of its own, and requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Server:
    """`lowtide serve` with the shipped model unless others are given, at a free port, which it keeps."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "lowtide", "serve", *arguments, "--data", str(data)]
        self._log = data / "log"
        data.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start it, anew if it was killed."""
        port = self.address.rpartition(":")[2] if self._log.exists() else "0"
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*self._command, "--port", port], stderr=log)

    @property
    def said(self) -> str:
        """What it has said at the terminal."""
        return self._log.read_text()

    @property
    def address(self) -> str:
        """Where it listens."""
        return re.findall(r"http://\S+", self.said)[0]

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 180
        while "http://" not in self.said or self.ask("GET", "/readyz")[0] != 200:
            assert time.monotonic() < until
            assert self.process.poll() is None, self.said
            time.sleep(0.1)

    def ask(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        """The status, and the answer, as bytes if it is no JSON."""
        status, _, body = self.asked(method, path, content, **headers)
        return status, body

    def asked(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any, Any]:
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, body, named, method=method)
        if body is not None and "Content-Type" not in named:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, _read(answer.headers, answer.read())
        except urllib.error.HTTPError as answer:
            return answer.code, answer.headers, _read(answer.headers, answer.read())

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.address}/jobs/{job}/events", timeout=60) as lines:
            for line in lines:
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])

    def ended(self, job: str) -> dict[str, Any]:
        """The job, once it has ended."""
        for _ in self.events(job):
            pass
        return self.ask("GET", f"/jobs/{job}")[1]

    def workers(self) -> list[int]:
        """The processes that compute."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """End it as a service manager does, and return its exit code."""
        self.process.terminate()
        return self.process.wait(30)


def _read(headers: Any, body: bytes) -> Any:
    return json.loads(body) if body and "json" in headers.get("Content-Type", "") else body
