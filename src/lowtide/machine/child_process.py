"""Run a module of ours in a process of its own: what measuring leaves in memory would stay in this one."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lowtide

_WATCHED = "LOWTIDE_PARENT_PIPE"
"""The environment variable that tells a child which pipe to watch."""
_SIGKILL = 9  # which the signal module of some systems lacks


class ChildError(RuntimeError):
    """A child process failed or took too long; the message ends with the last line that it printed."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, below 0 for a signal, and what it wrote to stdout and to stderr."""

    code: int
    printed: str
    errors: str

    @property
    def reason(self) -> str:
        """How it ended, in words, with the last line of its errors."""
        if self.code == -_SIGKILL:
            return "killed (out of memory?)"
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        last = next((line.strip() for line in reversed(self.errors.splitlines()) if line.strip()), "")
        return f"ended with code {self.code}" + (f": {last[:300]}" if last else "")


def run_module(module: str, *arguments: str, seconds: float = 120.0) -> str:
    """What `python -m module arguments` prints, with this very package; see `run_command`.

    Raises `ChildError` where it fails or takes longer than `seconds`.
    """
    try:
        ended = run_command(command(module, *arguments), seconds=seconds, environment=environment())
    except ChildError as error:
        raise ChildError(f"{module} {error}") from None
    if ended.code != 0:
        raise ChildError(f"{module} {ended.reason}")
    return ended.printed


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module, in a process that ends with the one that starts it.

    It looks for modules where this process does, so not always in the current folder.
    """
    safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
    return [sys.executable, *safe, "-m", __name__, module, *arguments]


def environment() -> dict[str, str]:
    """The environment of a child that is to import this very package."""
    path = os.pathsep.join([str(Path(lowtide.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def run_command(
    command: Sequence[str], *, seconds: float | None, environment: Mapping[str, str], given: str = ""
) -> Ended:
    """Run a command of `command` to its end, with `given` on its stdin.

    The child ends with this process, however that ends: it watches a pipe that only this process holds open. Raises
    `ChildError` where it takes longer than `seconds`; it has ended then too.
    """
    watched, held = os.pipe()
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**environment, _WATCHED: str(watched)},
            pass_fds=(watched,),
        ) as child:
            try:
                printed, errors = child.communicate(given, timeout=seconds)
            except BaseException:
                child.kill()
                raise
    except subprocess.TimeoutExpired:
        raise ChildError(f"took longer than {seconds:g} s") from None
    finally:
        os.close(watched)
        os.close(held)
    return Ended(child.returncode, printed, errors)


def _end_with_parent(watched: int) -> None:
    """End this process when the other end of the pipe is closed."""
    os.read(watched, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=(int(os.environ[_WATCHED]),), daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
