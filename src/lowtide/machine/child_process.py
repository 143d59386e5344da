"""Run a module of ours in a process of its own: what measuring leaves in memory would stay in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import lowtide


class ChildError(RuntimeError):
    """A child process failed or took too long; the message ends with the last line that it printed."""


def run_module(module: str, *arguments: str, seconds: float = 120.0) -> str:
    """What `python -m module arguments` prints, with this very package.

    The child ends with this process, however that ends: it watches a pipe that only this process holds open. Raises
    `ChildError` where it fails or takes longer than `seconds`.
    """
    path = os.pathsep.join([str(Path(lowtide.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    command = [sys.executable, "-m", __name__, module, *arguments]
    # Popen, not run: the child's stdin stays open, and empty, until the child has ended.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        try:
            printed, errors = _outputs(child, seconds)
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no output")
        raise ChildError(f"{module} ended with status {child.returncode}: {last[:300]}")
    return printed


def _outputs(child: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """What the child prints until it ends. `communicate` would close its stdin, and so end it, at once."""
    stdin, child.stdin = child.stdin, None
    assert stdin is not None
    try:
        return child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ChildError(f"{' '.join(child.args[3:])} took longer than {seconds:.0f} s") from None  # type: ignore[index]
    finally:
        stdin.close()


def _end_with_parent() -> None:
    """End this process when the other end of its stdin is closed."""
    os.read(0, 1)  # not sys.stdin: its lock, held at the end, would be a fatal error
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
