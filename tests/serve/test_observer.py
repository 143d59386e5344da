"""Figures, lines of the log, and spans."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")
from prometheus_client.parser import text_string_to_metric_families

from lowtide.serve.job import Job, State
from lowtide.serve.log_lines import JsonLines, TextLines, belongs_to, request_id, say
from lowtide.serve.measures import Measures
from lowtide.serve.observer import Observer
from lowtide.serve.spans import ASKING, Spans, TracedSpans, spans_from_environment

STAGE = {
    "name": "denoise", "predicted_peak": 400, "peak": 390, "predicted_seconds": 2.0, "seconds": 3.0, "moved": 70,
    "stalled": 0.5,
}  # fmt: skip
ANSWER = {"measured": 450, "peak": 500, "needs": {"vram": None, "ram": 500}, "taken": [STAGE]}


def a_job(state=State.DONE):
    job = Job("j1", "anna", "seascapes", {"prompt": "secret"}, [1, 2], 100.0, {"seconds": 2.0, "peak": 500}, state)
    job.started, job.ended, job.attempts, job.measured, job.request_id = 110.0, 116.0, 1, 450, "r1"
    return job


def values(measures):
    text = measures.text({"queued": 3}, 3, 7.5, 2, {"server": 11, "worker": 22}).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


def test_figures_of_a_job_stand_beside_its_plan():
    measures = Measures()
    job = a_job()
    measures.began(job)
    measures.ended(job, ANSWER)
    measures.died(job)
    measures.answered("/jobs/{job}", "GET", 404, 0.01)
    measures.refused("never fits")
    found = values(measures)
    expected = {
        ("lowtide_jobs", "queued"): 3,
        ("lowtide_waiting_jobs",): 3,
        ("lowtide_waiting_seconds",): 7.5,
        ("lowtide_worker_starts",): 2,
        ("lowtide_worker_deaths_total", "seascapes"): 1,
        ("lowtide_memory_bytes", "worker"): 22,
        ("lowtide_jobs_ended_total", "done", "seascapes"): 1,
        ("lowtide_job_waited_seconds_sum",): 10,
        ("lowtide_job_seconds_sum", "seascapes"): 6,
        ("lowtide_job_planned_seconds_sum", "seascapes"): 4,
        ("lowtide_job_seconds_ratio_sum", "seascapes"): 1.5,
        ("lowtide_job_peak_bytes", "seascapes"): 450,
        ("lowtide_job_planned_peak_bytes", "seascapes"): 500,
        ("lowtide_job_peak_ratio_sum", "seascapes"): 0.9,
        ("lowtide_stage_seconds_total", "denoise", "seascapes"): 3,
        ("lowtide_stage_planned_seconds_total", "denoise", "seascapes"): 2,
        ("lowtide_stage_peak_bytes", "denoise", "seascapes"): 390,
        ("lowtide_moved_bytes_total", "denoise", "memory", "seascapes"): 70,
        ("lowtide_stall_seconds_total", "denoise", "seascapes"): 0.5,
        ("lowtide_requests_total", "/jobs/{job}", "404", "GET"): 1,
        ("lowtide_refusals_total", "never fits"): 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_two_servers_have_figures_of_their_own():
    first, second = Measures(), Measures()
    first.refused("key")
    assert ("lowtide_refusals_total", "key") in values(first)
    assert ("lowtide_refusals_total", "key") not in values(second)


# ---- the log


def line_of(form, message="hello", **fields):
    record = logging.LogRecord("lowtide.serve", logging.INFO, __file__, 1, message, (), None)
    record.fields = fields
    return form.format(record)


def test_a_line_has_its_request_and_job():
    belongs_to(request="r1", job="j1")
    try:
        content = json.loads(line_of(JsonLines(), status=200, owner=None))
        text = line_of(TextLines(), status=200)
    finally:
        belongs_to(request=None, job=None)
    assert (content["message"], content["request"], content["job"], content["status"]) == ("hello", "r1", "j1", 200)
    assert "owner" not in content
    assert text.endswith("info: hello [request=r1 job=j1 status=200]")


def test_a_line_is_one_line_whatever_is_in_it():
    odd = "a\nb\x1b[31m\u2028\ud800"
    for form in (JsonLines(), TextLines()):
        line = line_of(form, odd, field=odd)
        assert line.isprintable()
        assert len(line.splitlines()) == 1


def test_ids_of_requests_are_taken_over_where_they_are_fit_for_a_log():
    for fit in ("a", "4bf92f35-77b3.a:1_2", "x" * 64):
        assert request_id(fit) == fit
    for unfit in (None, "", "a b", "x" * 65, "a\n", "é", '"'):
        assert request_id(unfit) not in ("", unfit)


def test_a_job_is_told_without_its_prompt(caplog):
    observer = Observer()
    with caplog.at_level(logging.INFO, "lowtide.serve"):
        job = a_job()
        observer.submitted(job)
        observer.began(job)
        observer.died(job, "killed")
        observer.ended(job, ANSWER)
        say(logging.INFO, "other")
    belongs_to(request=None, job=None)
    assert [record.getMessage() for record in caplog.records[:2]] == ["job taken", "job begun"]
    assert caplog.records[3].getMessage() == "job done"
    assert caplog.records[3].fields["seconds"] == 6
    assert all("secret" not in str(record.__dict__) for record in caplog.records)


# ---- spans


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for(monkeypatch):
    for name in ASKING:
        monkeypatch.delenv(name, raising=False)
    code = (
        "import sys; from lowtide.serve.application import make_app; "
        "from lowtide.serve.spans import *; s = spans_from_environment(); "
        "assert type(s) is Spans; assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_asked_for_and_not_installed_is_said(monkeypatch, caplog):
    monkeypatch.setenv(ASKING[0], "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert type(spans_from_environment()) is Spans
    assert "not installed" in caplog.text
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    caplog.clear()
    assert type(spans_from_environment()) is Spans
    assert not caplog.text


def test_a_request_its_plan_and_its_job_are_one_trace():
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observer = Observer(TracedSpans(provider.get_tracer("tests")))
    job, outer = a_job(), "4bf92f3577b34da6a3ce929d0e0e4736"
    with observer.spans.request({"traceparent": f"00-{outer}-00f067aa0ba902b7-01"}) as span:
        with observer.planning("seascapes"):
            pass
        observer.submitted(job)
        span.named("POST /jobs", **{"http.response.status_code": 202})
    observer.ended(job, ANSWER)
    spans = {each.name: each for each in exporter.get_finished_spans()}
    assert set(spans) == {"POST /jobs", "plan", "job", "denoise"}
    assert {f"{each.context.trace_id:032x}" for each in spans.values()} == {outer}
    parents = {name: each.parent.span_id for name, each in spans.items()}
    request = spans["POST /jobs"].context.span_id
    assert (parents["plan"], parents["job"]) == (request, request)
    assert parents["denoise"] == spans["job"].context.span_id
    assert spans["job"].end_time - spans["job"].start_time == 6 * 10**9
    assert spans["denoise"].end_time - spans["denoise"].start_time == 3 * 10**9
    assert spans["job"].attributes["lowtide.planned_seconds"] == 4
    assert "secret" not in str([dict(each.attributes) for each in spans.values()])
    provider.shutdown()
