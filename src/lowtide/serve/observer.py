"""What happens in the server, told to its figures, its log and its spans."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from lowtide.serve.job import Job, State
from lowtide.serve.log_lines import belongs_to, say
from lowtide.serve.measures import Measures
from lowtide.serve.spans import Spans


class Observer:
    """Is told of plans and jobs."""

    def __init__(self, spans: Spans | None = None) -> None:
        self.measures, self.spans = Measures(), spans or Spans()

    @contextmanager
    def planning(self, model: str) -> Generator[None]:
        """Around the making of a plan."""
        begin = time.perf_counter()
        with self.spans.plan(model):
            try:
                yield
            finally:
                self.measures.planned(model, time.perf_counter() - begin)

    def submitted(self, job: Job) -> None:
        """A job was taken."""
        self.spans.submitted(job)
        say(
            logging.INFO, "job taken", job=job.id, model=job.model, owner=job.owner, pictures=len(job.seeds),
            planned_seconds=round(job.seconds, 3), planned_peak=job.plan.get("peak"),
        )  # fmt: skip

    def began(self, job: Job) -> None:
        """A job was begun; the lines that this task writes from now on belong to it."""
        belongs_to(request=job.request_id, job=job.id)
        self.measures.began(job)
        say(logging.INFO, "job begun", model=job.model, attempt=job.attempts)

    def died(self, job: Job, why: str) -> None:
        """The process that computes has died during a job."""
        self.measures.died(job)
        say(logging.WARNING, f"the process that computes died: {why}", job=job.id, attempt=job.attempts)

    def ended(self, job: Job, answer: Mapping[str, Any] | None = None) -> None:
        """A job has ended; `answer` is what the process that computes said of one that is done."""
        self.measures.ended(job, answer)
        self.spans.ended(job, answer)
        seconds = None if job.started is None or job.ended is None else round(job.ended - job.started, 3)
        say(
            logging.ERROR if job.state is State.FAILED else logging.INFO, f"job {job.state.value}", job=job.id,
            request=job.request_id, model=job.model, seconds=seconds, planned_seconds=round(job.seconds, 3),
            peak=job.measured, planned_peak=job.plan.get("peak"), error=(job.error or {}).get("kind"),
        )  # fmt: skip
