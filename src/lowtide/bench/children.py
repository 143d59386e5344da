"""One run of the table in a fresh process: start it, and read its result or the reason why there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from lowtide.bench.runs import Job, Options, Outcome, Reading, Spec

ANSWER = "lowtide_run"
"""The key of the JSON object that a run prints, by which it is told from other output."""
LONGEST_REASON = 100
_MODULE = "lowtide.bench.one_run"
_SIGKILL = 9  # which the signal module of some systems lacks


def run_apart(options: Options, job: Job) -> Outcome:
    """Run a job in a process of its own, with an empty folder beside the table (`/tmp` may be in memory)."""
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".lowtide-", ignore_cleanup_errors=True) as folder:
        return ask(options.spec(job, folder), options.timeout)


def ask(spec: Spec, timeout: float | None) -> Outcome:
    """Start the process, send it `spec`, and give its reading or its failure; it has ended, whatever happens."""
    try:
        done = subprocess.run(
            command(),
            input=json.dumps(asdict(spec)),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=_environment(spec),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {timeout:g} s"
    answer = find_answer(done.stdout)
    if answer is None:
        return None, shortened(_how_it_ended(done.returncode, done.stderr))
    if "failure" in answer:
        return None, shortened(answer["failure"])
    return Reading(**answer["reading"]), None


def command() -> list[str]:
    """The process to start; it looks for modules where this one does, so not always in the current folder."""
    safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
    return [sys.executable, *safe, "-m", _MODULE]


def find_answer(output: str) -> dict[str, Any] | None:
    """The last line of `output` that is an answer, whatever else was printed before and after it."""
    for line in reversed(output.splitlines()):
        if ANSWER not in line:
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and ANSWER in content:
            return content[ANSWER]
    return None


def shortened(reason: str) -> str:
    """The first line of a reason, cut to `LONGEST_REASON` characters."""
    line = (reason.strip() or "no reason given").splitlines()[0]
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1].rstrip() + "…"


def _environment(spec: Spec) -> dict[str, str]:
    """On the CPU the GPUs are hidden: an offload that names no device would take one."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec.device == "cpu" else {}
    return {**os.environ, **hidden}


def _how_it_ended(code: int, errors: str) -> str:
    if code == -_SIGKILL:
        return "killed (out of memory?)"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = errors.strip().splitlines()
    return f"ended with code {code}" + (f": {lines[-1].strip()}" if lines else "")
