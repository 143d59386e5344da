"""Jobs in a database: what was taken is there after the server, or the machine, was killed at any moment."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowtide.serve.job import Job, State

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    idempotency_key TEXT,
    content TEXT NOT NULL,
    UNIQUE (owner, idempotency_key)
) STRICT
"""


class JobStore:
    """The jobs in the folder `folder`, and the files that came of them; several threads may use it.

    A change is on the disk when its method returns. Raises `OSError` for a folder that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._jobs = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._jobs.execute("PRAGMA journal_mode=WAL")
            self._jobs.execute("PRAGMA synchronous=FULL")
            self._jobs.execute(_TABLE)
        except sqlite3.Error as error:
            raise OSError(f"Jobs cannot be kept in {folder}: {error}.") from error

    def close(self) -> None:
        """Close the database."""
        self._jobs.close()

    def results(self, job: str) -> Path:
        """The folder of the files of a job."""
        return self._folder.resolve() / "results" / job

    @property
    def notes(self) -> Path:
        """The folder of what is learned about models."""
        return self._folder.resolve() / "notes"

    def forget_unfinished(self, job: str) -> None:
        """Remove what is kept so that a job can go on: it has ended."""
        for folder in self.results(job).glob("kept-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, job: Job) -> Job:
        """Keep a new job; one with the same owner and idempotency key that is there already is returned instead."""
        with self._changing() as jobs:
            values = (job.id, job.owner, job.state, job.created, job.idempotency_key, json.dumps(job.to_dict()))
            done = jobs.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", values)
            if done.rowcount:
                return job
            row = jobs.execute(
                "SELECT content FROM jobs WHERE owner = ? AND idempotency_key = ?", (job.owner, job.idempotency_key)
            ).fetchone()
        return _job(row)

    def keep(self, job: Job) -> None:
        """Keep what has changed of a job."""
        with self._changing() as jobs:
            values = (job.state, json.dumps(job.to_dict()), job.id)
            jobs.execute("UPDATE jobs SET state = ?, content = ? WHERE id = ?", values)

    def get(self, job: str) -> Job | None:
        """A job by its id."""
        with self._lock:
            row = self._jobs.execute("SELECT content FROM jobs WHERE id = ?", (job,)).fetchone()
        return None if row is None else _job(row)

    def jobs(
        self, *states: State, owner: str | None = None, asked_as: str | None = None, most: int | None = None
    ) -> list[Job]:
        """Jobs in any of the states (none: all), the newest first."""
        where, values = ["1"], list[Any]()
        if states:
            where.append(f"state IN ({', '.join('?' * len(states))})")
            values += states
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        if asked_as is not None:
            where.append("json_extract(content, '$.asked_as') = ?")
            values.append(asked_as)
        limit = "" if most is None else f" LIMIT {int(most)}"
        query = f"SELECT content FROM jobs WHERE {' AND '.join(where)} ORDER BY created DESC{limit}"
        with self._lock:
            return [_job(row) for row in self._jobs.execute(query, values).fetchall()]

    def counts(self) -> dict[str, int]:
        """How many jobs there are, by state."""
        with self._lock:
            rows = self._jobs.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall()
        return {**dict.fromkeys((state.value for state in State), 0), **dict(rows)}

    def ended(self) -> list[tuple[str, float]]:
        """The jobs that have ended and when, the newest first."""
        ends = [state for state in State if state.is_end]
        when = "COALESCE(json_extract(content, '$.ended'), created)"
        query = f"SELECT id, {when} FROM jobs WHERE state IN ({', '.join('?' * len(ends))}) ORDER BY 2 DESC"
        with self._lock:
            return self._jobs.execute(query, ends).fetchall()

    def known(self, names: Sequence[str]) -> set[str]:
        """Those of the names that are ids of jobs."""
        with self._lock:
            rows = self._jobs.execute(
                "SELECT id FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(names),)
            ).fetchall()
        return {row[0] for row in rows}

    def remove(self, job: str) -> None:
        """Forget a job, and remove its files."""
        with self._changing() as jobs:
            jobs.execute("DELETE FROM jobs WHERE id = ?", (job,))
        shutil.rmtree(self.results(job), ignore_errors=True)

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._jobs
            except sqlite3.OperationalError as error:  # a full disk, or a file that is gone
                raise OSError(f"{self._folder}: {error}") from error


def _job(row: Any) -> Job:
    content = json.loads(row[0])
    return Job(**{**content, "state": State(content["state"])})
