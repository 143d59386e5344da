"""A process watched from outside: samples of its resident memory, and a memory limit of the system around it.

What a process says of its own peak may miss some of it, since every stage begins the kernel's high-water mark anew.
Linux only; limits need the right to make cgroups, as root has it in many containers.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

INTERVAL = 0.002
"""Seconds between two samples."""


def run_watched(command: Sequence[str], limit: Path | None) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a command; how it ended, and the most bytes that were seen resident.

    It runs in the memory group that has the file `limit`, where one is given.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if limit is not None:
        (limit.parent / "cgroup.procs").write_text(str(process.pid), encoding="ascii")
    samples = [0]
    watcher = threading.Thread(target=_watch, args=(process, samples))
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), max(samples)


def _watch(process: subprocess.Popen[str], samples: list[int]) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, IndexError):  # it has ended
        while process.returncode is None:
            pages = int(Path(f"/proc/{process.pid}/statm").read_bytes().split()[1])
            samples[0] = max(samples[0], pages * page)
            time.sleep(INTERVAL)


@contextmanager
def memory_group() -> Iterator[Path | None]:
    """The file with the limit of a new memory group, which has none yet; None where no group can be made."""
    limit = _new_group()
    try:
        yield limit
    finally:
        if limit is not None:
            limit.parent.rmdir()


def _new_group() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("memory", ""):
            continue
        group = Path("/sys/fs/cgroup", controllers, place.lstrip("/"), f"lowtide-benchmark-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (group / name).exists():
                    return group / name
            group.rmdir()
    return None
