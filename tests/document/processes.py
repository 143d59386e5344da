"""Run scripts in processes of their own: in a fresh interpreter, or forked from one with the imports done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WARM = Path(__file__).with_name("warm.py")
SCRIPT, OUTPUT = "script.py", "output.txt"


@dataclass(frozen=True)
class Result:
    """The exit status (negative: the signal), and what was written to stdout and stderr together."""

    status: int
    output: str

    def check(self) -> str:
        """The output; `AssertionError` with all of it where the script failed."""
        assert self.status == 0, f"exit status {self.status}\n{self.output}"
        return self.output


class Fresh:
    """Every script in a fresh interpreter, as a user would run it."""

    def run(self, script: str, folder: Path, limit: int) -> Result:
        """Run `script` in `folder`, for at most `limit` seconds."""
        (folder / SCRIPT).write_text(script, encoding="utf-8")
        with (folder / OUTPUT).open("wb") as output:
            done = subprocess.run(
                [sys.executable, SCRIPT],
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        return _result(folder, done.returncode)


class Warm:
    """Every script in a process forked from one that has imported torch and lowtide: three seconds less a script."""

    def __init__(self, become: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> None:
        """With `become` as the command in front, and with `variables` as the environment instead of this process's."""
        self._parent = subprocess.Popen(
            [*become, sys.executable, str(WARM)],
            env=environment(os.environ if variables is None else variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, folder: Path, limit: int) -> Result:
        """Run `script` in `folder`, for at most `limit` seconds."""
        (folder / SCRIPT).write_text(script, encoding="utf-8")
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps({"folder": str(folder), "limit": limit}), file=self._parent.stdin, flush=True)
        return _result(folder, int(self._parent.stdout.readline()))

    def close(self) -> None:
        """End the process that forks."""
        self._parent.kill()
        self._parent.communicate()


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment, this process's if no other, with the library and the tests of this very tree, and no network."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def _result(folder: Path, status: int) -> Result:
    return Result(status, (folder / OUTPUT).read_text(encoding="utf-8", errors="replace"))
