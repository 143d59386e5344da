"""One run of the table in a fresh process: start it, and read its result or the reason why there is none."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from typing import Any

from lowtide.bench.runs import Job, Options, Outcome, Reading, Spec
from lowtide.machine import child_process
from lowtide.machine.child_process import ChildError, run_command

ANSWER = "lowtide_run"
"""The key of the JSON object that a run prints, by which it is told from other output."""
LONGEST_REASON = 100
_MODULE = "lowtide.bench.one_run"


def run_apart(options: Options, job: Job) -> Outcome:
    """Run a job in a process of its own, with an empty folder beside the table (`/tmp` may be in memory)."""
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".lowtide-", ignore_cleanup_errors=True) as folder:
        return ask(options.spec(job, folder), options.timeout)


def ask(spec: Spec, timeout: float | None) -> Outcome:
    """Start the process, send it `spec`, and give its reading or its failure; it has ended, whatever happens."""
    try:
        ended = run_command(command(), seconds=timeout, environment=_environment(spec), given=json.dumps(asdict(spec)))
    except ChildError as error:
        return None, str(error)
    answer = find_answer(ended.printed)
    if answer is None:
        return None, shortened(ended.reason)
    if "failure" in answer:
        return None, shortened(answer["failure"])
    return Reading(**answer["reading"]), None


def command() -> list[str]:
    """The process to start."""
    return child_process.command(_MODULE)


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
    return {**child_process.environment(), **hidden}
