"""Spans of requests, plans and jobs for OpenTelemetry, where it is installed and its own variables ask for it.

Without them nothing of it is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from lowtide.serve.job import Job
from lowtide.serve.log_lines import say

ASKING = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables of which one must be set."""
_NS = 10**9


class Span:
    """A span that goes on, or, as here, none."""

    def named(self, name: str, **attributes: Any) -> None:
        """Give it its name, once it is known."""


class Spans:
    """What is told of requests, plans and jobs; nothing here."""

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Generator[Span]:
        """Around a request."""
        yield Span()

    @contextmanager
    def plan(self, model: str) -> Generator[None]:
        """Around the making of a plan."""
        yield

    def submitted(self, job: Job) -> None:
        """A job was taken: its span belongs to the request of now."""

    def ended(self, job: Job, answer: Mapping[str, Any] | None) -> None:
        """A job has ended."""


class _OpenSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def named(self, name: str, **attributes: Any) -> None:
        self._span.update_name(name)
        self._span.set_attributes(attributes)


class TracedSpans(Spans):
    """Spans by a tracer of OpenTelemetry."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._contexts: dict[str, Any] = {}

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Generator[Span]:
        """Around a request; one that comes with a `traceparent` is a part of that trace."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carried = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context = TraceContextTextMapPropagator().extract(carried)
        with self._tracer.start_as_current_span("request", context, SpanKind.SERVER) as span:
            yield _OpenSpan(span)

    @contextmanager
    def plan(self, model: str) -> Generator[None]:
        """Around the making of a plan."""
        with self._tracer.start_as_current_span("plan", attributes={"lowtide.model": model}):
            yield

    def submitted(self, job: Job) -> None:
        """A job was taken: its span belongs to the request of now."""
        from opentelemetry.context import get_current

        self._contexts[job.id] = get_current()

    def ended(self, job: Job, answer: Mapping[str, Any] | None) -> None:
        """A job has ended: its span, and one for each stage. Stages have their lengths, and follow one another."""
        from opentelemetry.trace import set_span_in_context

        context = self._contexts.pop(job.id, None)
        if job.started is None or job.ended is None:
            return
        span = self._tracer.start_span("job", context, attributes=_attributes(job), start_time=int(job.started * _NS))
        at = int(job.started * _NS)
        for stage in (answer or {}).get("taken", ()):
            inner = self._tracer.start_span(stage["name"], set_span_in_context(span), start_time=at)
            inner.set_attributes(
                {f"lowtide.{name}": stage[name] for name in ("peak", "moved", "stalled") if stage[name]}
            )
            at += int(stage["seconds"] * _NS)
            inner.end(at)
        span.end(max(at, int(job.ended * _NS)))


def _attributes(job: Job) -> dict[str, Any]:
    named = {
        "model": job.model, "job": job.id, "state": job.state.value, "attempts": job.attempts,
        "planned_seconds": job.seconds, "peak": job.measured, "planned_peak": job.plan.get("peak"),
        "waited": None if job.started is None else job.started - job.created, "request": job.request_id,
    }  # fmt: skip
    return {f"lowtide.{name}": value for name, value in named.items() if value is not None}


def spans_from_environment() -> Spans:
    """As OpenTelemetry's variables ask: spans that are sent by OTLP over HTTP, or none."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not any(os.environ.get(name) for name in ASKING):
        return Spans()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # pyright: ignore[reportMissingImports]
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        needed = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http"
        say(logging.WARNING, f"OpenTelemetry is asked for and not installed ({error}): it needs {needed}.")
        return Spans()
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "lowtide")})
    provider = TracerProvider(resource=resource)  # at exit it sends what is left
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return TracedSpans(provider.get_tracer("lowtide.serve"))
