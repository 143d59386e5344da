"""How long jobs that have ended are kept, by age and by bytes; folders that belong to no job are removed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lowtide.serve.job_store import JobStore
from lowtide.serve.log_lines import LOG, say

PAUSE = 300.0
"""Seconds between two sweeps."""
LOST = 3600.0
"""Seconds after which a folder without a job belongs to none that is just being taken."""
FETCHED = 60.0
"""Seconds for which results are there at least, so that who waited for them can fetch them."""
DAY = 24 * 3600.0


@dataclass(frozen=True)
class Retention:
    """Jobs that have ended are kept for `seconds`, and the newest of them up to `nbytes` of files; None is no limit."""

    seconds: float | None = None
    nbytes: int | None = None

    async def keep_up(self, store: JobStore) -> None:
        """Sweep now and every few minutes, until cancelled."""
        while True:
            try:
                removed, lost = await asyncio.to_thread(self.sweep, store, time.time())
                if removed or lost:
                    say(logging.INFO, "swept", jobs=removed, folders=lost)
            except OSError as error:
                LOG.error("What has ended cannot be removed: %s", error)
            await asyncio.sleep(PAUSE)

    def sweep(self, store: JobStore, now: float) -> tuple[int, int]:
        """Remove what is too old or too much; returns how many jobs, and how many folders without a job."""
        lost = _lost(store, now)
        for folder in lost:
            shutil.rmtree(folder, ignore_errors=True)
        if self.seconds is None and self.nbytes is None:
            return 0, len(lost)
        removed, kept_bytes = 0, 0
        for job, ended in store.ended():  # the newest first: once there is too much, all that is older goes
            kept_bytes += _nbytes(store.results(job))
            old = self.seconds is not None and ended < now - self.seconds
            much = self.nbytes is not None and kept_bytes > self.nbytes
            if (old or much) and ended < now - FETCHED:
                store.remove(job)
                removed += 1
        return removed, len(lost)


def _lost(store: JobStore, now: float) -> list[Path]:
    """Folders without a job, as a kill between the two removals leaves them."""
    folders = [folder for folder in store.results("").glob("*") if folder.stat().st_mtime < now - LOST]
    known = store.known([folder.name for folder in folders])  # after the folders: jobs are kept before theirs is made
    return [folder for folder in folders if folder.name not in known]


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("**/*") if file.is_file())
