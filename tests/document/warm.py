"""Imports what takes long, then runs each script it is told of in a fork of itself and prints the exit status.

Each line of stdin is a job, {"folder": ..., "limit": seconds}; see `processes.Warm`.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import torch  # noqa: F401
from tests.document.processes import OUTPUT, SCRIPT

import lowtide.pipelines.cogvideox
import lowtide.pipelines.stable_diffusion  # noqa: F401


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job["folder"], job["limit"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(folder: str, limit: int) -> None:
    """Run the script as a fresh interpreter would, and end this process."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(limit)
    status = 0
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
