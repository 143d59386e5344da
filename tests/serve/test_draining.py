"""How the server ends, and how each request is told of in the log."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi")
from tests.serve.stand_in import Serving, stand_in_app

from lowtide.serve.job import State
from lowtide.serve.job_store import JobStore

JOB = {"prompt": "a secret", "width": 64, "height": 64, "num_inference_steps": 10}


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def state(serving, job):
    return serving.ask("GET", f"/jobs/{job}")[2]["state"]


def test_what_runs_ends_what_waits_stays_and_who_waits_is_told(tmp_path):
    app, dispatcher = stand_in_app(tmp_path, pause=0.15)
    answers = []
    with Serving(app, dispatcher, drain_seconds=20) as serving:
        running, waiting = (serving.ask("POST", "/jobs", JOB)[2]["id"] for _ in range(2))
        until(lambda: state(serving, running) == "running")
        asked = {"prompt": "a boat", "size": "64x64"}
        threads = [
            threading.Thread(target=lambda: answers.append(serving.ask("POST", "/v1/images/generations", asked))),
            threading.Thread(target=lambda: answers.append(serving.ask("GET", f"/jobs/{waiting}/events"))),
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(dispatcher.waiting) == 2)
        serving.end()
        until(lambda: dispatcher.is_draining)
        status, headers, problem = serving.ask("POST", "/jobs", JOB)
        assert (status, headers["Retry-After"]) == (503, "30")
        assert "ending" in problem["detail"]
        assert serving.ask("GET", "/readyz")[0] == 503
        assert serving.ask("GET", "/healthz")[0] == 200
        assert serving.ask("POST", "/plan", JOB)[0] == 200
        for thread in threads:
            thread.join(10)
        assert sorted(answer[0] for answer in answers) == [200, 503], "who waits for what waits is told at once"
        assert state(serving, running) == "running"
        assert b'refusals_total{reason="draining"} 2' in serving.ask("GET", "/metrics")[2]
        serving.wait()
    store = JobStore(tmp_path)
    assert store.get(running).state is State.DONE
    assert store.get(waiting).state is State.QUEUED
    assert store.counts()["cancelled"] == 1, "that of a request which was answered is made by nobody"
    store.close()


def running_job(serving):
    job = serving.ask("POST", "/jobs", JOB)[2]["id"]
    until(lambda: state(serving, job) == "running")
    return job


def test_what_does_not_end_in_time_is_begun_again_by_the_next_server(tmp_path):
    app, dispatcher = stand_in_app(tmp_path, pause=1.0)
    with Serving(app, dispatcher, drain_seconds=0.2) as serving:
        job = running_job(serving)
        serving.end()
        serving.wait()
    app, dispatcher = stand_in_app(tmp_path)
    with Serving(app, dispatcher) as serving:
        until(lambda: state(serving, job) == "done")
        done = serving.ask("GET", f"/jobs/{job}")[2]
        assert (done["attempts"], done["deaths"]) == (2, 0)


def test_a_second_signal_ends_it_at_once(tmp_path):
    app, dispatcher = stand_in_app(tmp_path, pause=1.0)
    with Serving(app, dispatcher, drain_seconds=60) as serving:
        job = running_job(serving)
        serving.end()
        serving.end()
        serving.wait()
    store = JobStore(tmp_path)
    assert store.get(job).state is State.RUNNING
    store.close()


# ---- requests in the log


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    app, dispatcher = stand_in_app(tmp_path_factory.mktemp("log"), keys=("a key that is long enough",))
    with Serving(app, dispatcher) as serving:
        yield serving


KEY = {"Authorization": "Bearer a key that is long enough"}


def test_a_request_its_job_and_its_lines_have_one_id(serving, caplog):
    caplog.set_level("INFO", "lowtide.serve")
    _, headers, job = serving.ask("POST", "/jobs", JOB, X_Request_ID="ours-1", **KEY)
    assert headers["X-Request-ID"] == "ours-1"
    until(lambda: serving.ask("GET", f"/jobs/{job['id']}", **KEY)[2]["state"] == "done")
    assert serving.ask("GET", f"/jobs/{job['id']}", **KEY)[2]["request_id"] == "ours-1"
    lines = {record.getMessage(): record for record in caplog.records}
    assert lines["job done"].fields["request"] == "ours-1"
    fields = lines["POST /jobs 202"].fields
    assert (fields["method"], fields["route"], fields["status"]) == ("POST", "/jobs", 202)
    assert fields["ms"] > 0
    assert len(fields["owner"]) == 16
    assert not [record for record in caplog.records if "secret" in str(record.__dict__) or "long enough" in str(record)]


def test_an_odd_id_is_not_taken_over_and_a_refusal_has_its_reason(serving, caplog):
    caplog.set_level("INFO", "lowtide.serve")
    status, headers, _ = serving.ask("GET", "/jobs/x?y=z", X_Request_ID="x" * 200)
    assert (status, len(headers["X-Request-ID"])) == (401, 32)
    until(lambda: caplog.records)
    assert caplog.records[-1].getMessage() == "GET /jobs/{job} 401"
    assert caplog.records[-1].fields["refused"] == "key"
    large = {**JOB, "width": 1024, "height": 1024}
    for content in ({}, large):
        assert serving.ask("POST", "/jobs", content, **KEY)[0] == 422
    figures = serving.ask("GET", "/metrics")[2].decode()
    for reason in ("key", "invalid", "never fits"):
        assert f'lowtide_refusals_total{{reason="{reason}"}}' in figures
    assert 'lowtide_requests_total{method="GET",route="/jobs/{job}",status="401"}' in figures
