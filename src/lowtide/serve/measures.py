"""Figures for Prometheus: requests, refusals, jobs, and what they took beside what was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from lowtide.serve.job import Job

SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)
RATIOS = (0.25, 0.5, 0.75, 0.9, 0.95, 1, 1.02, 1.05, 1.1, 1.25, 1.5, 2, 4)
"""Of what was measured to what was planned; 1 is as planned."""


class Measures:
    """All figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # else each figure comes twice
        self.registry = registry = CollectorRegistry()

        def counter(name: str, said: str, *labels: str) -> Counter:
            return Counter(f"lowtide_{name}", said, labels, registry=registry)

        def gauge(name: str, said: str, *labels: str) -> Gauge:
            return Gauge(f"lowtide_{name}", said, labels, registry=registry)

        def histogram(name: str, said: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"lowtide_{name}", said, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that were answered.", "route", "method", "status")
        self._request_seconds = histogram(
            "request_seconds", "From a request to the end of its answer.", SECONDS, "route", "method"
        )
        self._refusals = counter("refusals", "Requests that were refused.", "reason")
        self._planning = histogram("planning_seconds", "Seconds that plans took to make.", SECONDS, "model")
        self._jobs = gauge("jobs", "Jobs that are kept.", "state")
        self._waiting = gauge("waiting_jobs", "Jobs that wait.")
        self._waiting_seconds = gauge("waiting_seconds", "What the jobs that wait will take, as planned.")
        self._waited = histogram("job_waited_seconds", "From when a job was taken to its beginning.", SECONDS)
        self._ended = counter("jobs_ended", "Jobs that have ended.", "model", "state")
        self._seconds = histogram("job_seconds", "What jobs that are done took.", SECONDS, "model")
        self._planned = histogram("job_planned_seconds", "What the same jobs would take, as planned.", SECONDS, "model")
        self._seconds_ratio = histogram("job_seconds_ratio", "Seconds measured to planned.", RATIOS, "model")
        self._peak = gauge("job_peak_bytes", "The peak of the last job that is done.", "model")
        self._planned_peak = gauge("job_planned_peak_bytes", "Its planned peak.", "model")
        self._peak_ratio = histogram("job_peak_ratio", "Peaks measured to planned.", RATIOS, "model")
        stage = ("model", "stage")
        self._stage_seconds = counter("stage_seconds", "What stages took.", *stage)
        self._stage_planned = counter("stage_planned_seconds", "What they would take, as planned.", *stage)
        self._stage_peak = gauge("stage_peak_bytes", "The peak of a stage, in the last job that is done.", *stage)
        self._stage_planned_peak = gauge("stage_planned_peak_bytes", "Its planned peak.", *stage)
        self._moved = counter("moved_bytes", "Bytes of weights brought to a tier.", *stage, "tier")
        self._stalls = counter("stall_seconds", "What computing waited for weights.", *stage)
        self._starts = gauge("worker_starts", "How often a process that computes was started.")
        self._deaths = counter("worker_deaths", "Jobs during which the process that computes died.", "model")
        self._memory = gauge("memory_bytes", "Resident memory now.", "process")

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has its answer; `route` is the template of its path."""
        self._requests.labels(route, method, status).inc()
        self._request_seconds.labels(route, method).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused."""
        self._refusals.labels(reason).inc()

    def planned(self, model: str, seconds: float) -> None:
        """A plan was made, or refused, in so many seconds."""
        self._planning.labels(model).observe(seconds)

    def began(self, job: Job) -> None:
        """A job was begun."""
        if job.started is not None and job.attempts == 1:
            self._waited.observe(max(0.0, job.started - job.created))

    def died(self, job: Job) -> None:
        """The process that computes has died during a job."""
        self._deaths.labels(job.model).inc()

    def ended(self, job: Job, answer: Mapping[str, Any] | None) -> None:
        """A job has ended; `answer` is what `Engine.run` said of one that is done."""
        self._ended.labels(job.model, job.state.value).inc()
        if answer is None or job.started is None or job.ended is None:
            return
        seconds, planned = max(0.0, job.ended - job.started), job.seconds
        self._seconds.labels(job.model).observe(seconds)
        self._planned.labels(job.model).observe(planned)
        if planned > 0:
            self._seconds_ratio.labels(job.model).observe(seconds / planned)
        self._peaks(job.model, answer)
        tier = "device" if (answer.get("needs") or {}).get("vram") is not None else "memory"
        for stage in answer.get("taken", ()):
            self._took(job.model, stage, tier)

    def _peaks(self, model: str, answer: Mapping[str, Any]) -> None:
        peak, planned = answer.get("measured") or 0, answer.get("peak") or 0
        self._peak.labels(model).set(peak)
        self._planned_peak.labels(model).set(planned)
        if peak and planned:
            self._peak_ratio.labels(model).observe(peak / planned)

    def _took(self, model: str, stage: Mapping[str, Any], tier: str) -> None:
        labels = model, stage["name"]
        self._stage_seconds.labels(*labels).inc(stage["seconds"])
        self._stage_planned.labels(*labels).inc(stage["predicted_seconds"])
        self._stage_planned_peak.labels(*labels).set(stage["predicted_peak"])
        if stage["peak"] is not None:
            self._stage_peak.labels(*labels).set(stage["peak"])
        self._moved.labels(*labels, tier).inc(stage["moved"])
        self._stalls.labels(*labels).inc(stage["stalled"])

    def text(
        self, jobs: Mapping[str, int], waiting: int, waiting_seconds: float, starts: int, memory: Mapping[str, int]
    ) -> bytes:
        """All figures in Prometheus' format; given are those of this moment, jobs by state and memory by process."""
        for state, count in jobs.items():
            self._jobs.labels(state).set(count)
        self._waiting.set(waiting)
        self._waiting_seconds.set(waiting_seconds)
        self._starts.set(starts)
        self._memory.clear()
        for process, size in memory.items():
            self._memory.labels(process).set(size)
        return generate_latest(self.registry)
