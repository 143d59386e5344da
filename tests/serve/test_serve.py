"""`lowtide serve` as its clients see it: plans, admission, jobs, pictures, and what is left after it was killed."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tests.serve.server import Server

import lowtide
from lowtide.cli.request import shipped_model

pytest.importorskip("fastapi")
ASKED = {"prompt": "a boat", "width": 128, "height": 128, "num_inference_steps": 4, "seed": 7}
LONG = {**ASKED, "num_inference_steps": 30}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"), "--ram", "700MB")
    server.wait_until_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def expected():
    """The pictures of plain runs, by seed."""
    pipe = lowtide.load(str(shipped_model()), ram="4GB", device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def picture(asked, seed):
        call = {name: value for name, value in asked.items() if name != "seed"}
        return np.array(pipe(**call, generator=torch.Generator("cpu").manual_seed(seed)).images[0])

    return picture


def pixels(content):
    return np.array(Image.open(io.BytesIO(content)))


def result(server, job, place=0):
    status, content = server.ask("GET", f"/jobs/{job}/content/{place}")
    assert status == 200
    return pixels(content)


def test_a_plan_runs_nothing(server):
    status, plan = server.ask("POST", "/plan", ASKED)
    assert (status, plan["fits"]) == (200, True)
    assert 0 < plan["peak"] < 700 * 10**6
    assert plan["seconds"] > 0
    assert server.ask("GET", "/jobs")[1] == {"jobs": []}


def test_pictures_of_a_job_are_those_of_plain_runs(server, expected):
    status, job = server.ask("POST", "/jobs", {**ASKED, "n": 2})
    assert status == 202
    steps = [(now.get("picture"), now.get("step")) for now in server.events(job["id"]) if now["state"] == "running"]
    assert steps == sorted(steps, key=lambda step: tuple(number or 0 for number in step))
    done = server.ended(job["id"])
    assert (done["state"], done["seeds"], len(done["content"])) == ("done", [7, 8], 2)
    for place, seed in enumerate(done["seeds"]):
        assert np.array_equal(result(server, job["id"], place), expected(ASKED, seed))
    assert done["measured"] <= done["plan"]["peak"]


def test_pictures_as_openais_clients_ask_for_them(server, expected):
    asked = {"prompt": "a boat", "size": "128x128", "num_inference_steps": 4, "seed": 7, "model": "seascapes"}
    status, answer = server.ask("POST", "/v1/images/generations", asked)
    assert status == 200
    assert np.array_equal(pixels(base64.b64decode(answer["data"][0]["b64_json"])), expected(ASKED, 7))
    _, answer = server.ask("POST", "/v1/images/generations", {**asked, "response_format": "url"})
    assert answer["data"][0]["url"].startswith(server.address)
    assert [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]] == ["seascapes"]


def test_the_same_key_is_the_same_job(server):
    jobs = [server.ask("POST", "/jobs", ASKED, Idempotency_Key="one") for _ in range(2)]
    assert jobs[0][1]["id"] == jobs[1][1]["id"]
    assert server.ask("POST", "/jobs", ASKED, Idempotency_Key="two")[1]["id"] != jobs[0][1]["id"]


def test_a_job_is_cancelled_between_its_steps(server):
    running, waiting = (server.ask("POST", "/jobs", LONG)[1]["id"] for _ in range(2))
    assert server.ask("POST", f"/jobs/{waiting}/cancel")[1]["state"] == "cancelled"
    next(now for now in server.events(running) if now["state"] == "running" and now.get("step"))
    server.ask("POST", f"/jobs/{running}/cancel")
    assert server.ended(running)["state"] == "cancelled"


def test_a_job_ends_at_its_deadline(server):
    status, problem = server.ask("POST", "/jobs", {**ASKED, "num_inference_steps": 400, "deadline": 0.1})
    assert (status, "deadline" in problem["detail"]) == (422, True)
    running = server.ask("POST", "/jobs", {**ASKED, "num_inference_steps": 400})[1]["id"]
    waiting = server.ask("POST", "/jobs", {**ASKED, "deadline": 2})[1]["id"]
    ended = server.ended(waiting)
    assert (ended["state"], ended["error"]["kind"], ended["attempts"]) == ("cancelled", "deadline", 0)
    server.ask("POST", f"/jobs/{running}/cancel")
    assert server.ended(running)["state"] == "cancelled"


def test_who_goes_away_cancels(server):
    address = server.address.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=60)
    asked = {"prompt": "a boat", "size": "128x128", "num_inference_steps": 400}
    connection.request("POST", "/v1/images/generations", json.dumps(asked), {"Content-Type": "application/json"})
    until = time.monotonic() + 30
    while not (running := server.ask("GET", "/jobs?state=running")[1]["jobs"]) and time.monotonic() < until:
        time.sleep(0.05)
    connection.close()
    assert server.ended(running[0]["id"])["state"] == "cancelled"


def test_a_job_that_has_ended_is_deleted(server):
    job = server.ask("POST", "/jobs", {**ASKED, "num_inference_steps": 400})[1]["id"]
    assert server.ask("DELETE", f"/jobs/{job}")[0] == 409
    server.ask("POST", f"/jobs/{job}/cancel")
    server.ended(job)
    assert server.ask("DELETE", f"/jobs/{job}")[0] == 204
    assert server.ask("GET", f"/jobs/{job}")[0] == 404


def test_the_page_is_there_and_asks_for_nothing_from_elsewhere(server):
    status, headers, page = server.asked("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    parts = re.findall(rb'(?:href|src)="([^"]+)"', page)
    assert parts == [b"data:,", b"page/style.css", b"page/script.js"]
    for part in parts[1:]:
        status, _, content = server.asked("GET", f"/{part.decode()}")
        assert status == 200
        assert not re.findall(rb"https?:|@import", content)
    assert server.ask("GET", "/page/index.html")[0] == 404


# ---- what is refused, and how


REFUSED = {
    "no prompt": ({}, 422, "prompt"),
    "an empty prompt": ({**ASKED, "prompt": ""}, 422, "prompt"),
    "a wrong name": ({**ASKED, "stepz": 4}, 422, "stepz"),
    "a name of other models": ({**ASKED, "num_frames": 9}, 422, "num_frames"),
    "half a size": ({"prompt": "a boat", "width": 128}, 422, "height"),
    "a size between": ({**ASKED, "width": 129}, 422, "129"),
    "too many pixels": ({**ASKED, "width": 10**6, "height": 10**6}, 422, "pixels"),
    "too many steps": ({**ASKED, "num_inference_steps": 10**6}, 422, "steps"),
    "a long prompt": ({**ASKED, "prompt": "x" * 10**5}, 422, "characters"),
    "another model": ({**ASKED, "model": "/etc/passwd"}, 404, "no model"),
    "no JSON": (b"{", 422, "JSON"),
    "a list": ([], 422, "dictionary"),
    "a number that is none": (b'{"prompt": "a boat", "guidance_scale": NaN}', 422, ""),
    "a long body": (b" " * 2**21, 413, "bytes"),
}


@pytest.mark.parametrize("path", ["/jobs", "/plan"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_a_problem_that_says_what(server, name, path):
    content, expected_status, told = REFUSED[name]
    status, headers, problem = server.asked("POST", path, content)
    assert status == expected_status
    assert headers["Content-Type"] == "application/problem+json"
    assert told in problem["detail"]
    assert problem["status"] == status


ODD_NUMBERS = [True, -1, 0, 1, 8, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308]
ODD = [None, *ODD_NUMBERS, "", "x", "\0", "\ud800", "128", "../../etc/passwd", [], {}, [1]]


def test_nothing_odd_is_a_fault_of_the_server(server):
    chance = random.Random(0)
    names = ["model", "prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps"]
    names += ["guidance_scale", "seed", "n", "size", "response_format", "user", "other"]
    for _ in range(200):
        content = {"prompt": "a boat", "width": 64, "height": 64}
        content |= {name: chance.choice(ODD) for name in chance.sample(names, chance.randint(1, 3))}
        status, answer = server.ask("POST", "/plan", content)
        assert status in (200, 404, 422), (content, answer)
    for path in ("/jobs?most=0", "/jobs?state=x", "/jobs/%00", "/jobs/..%2f..%2fetc", "/nothing"):
        assert server.ask("GET", path)[0] in (404, 422)
    assert server.ask("DELETE", "/jobs")[0] == 405


def test_what_can_never_fit_is_refused_with_what_would(server):
    large = {**ASKED, "width": 1536, "height": 1536, "num_inference_steps": 2}
    status, problem = server.ask("POST", "/jobs", large)
    assert status == 422
    assert problem["minimum"]["ram"] > 600 * 10**6
    possible = problem["possible"]
    assert server.ask("POST", "/plan", {**large, **possible})[1]["fits"]


def test_jobs_that_are_not_there(server):
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/content/0"), ("POST", "/cancel")):
        assert server.ask(method, f"/jobs/none{path}")[0] == 404


def test_answers_are_kept_by_nobody_and_read_as_nothing_else(server):
    _, headers, _ = server.asked("GET", "/healthz")
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert b"lowtide_jobs" in server.ask("GET", "/metrics")[1]


# ---- nothing is lost


@pytest.mark.parametrize(("number", "deaths", "kills"), [(signal.SIGKILL, 0, 1), (signal.SIGABRT, 1, 0)])
def test_a_job_whose_process_is_killed_goes_on_and_gives_the_same(server, expected, number, deaths, kills):
    job = server.ask("POST", "/jobs", LONG)[1]["id"]
    next(now for now in server.events(job) if now["state"] == "running" and now.get("step"))
    (worker,) = server.workers()
    os.kill(worker, number)
    done = server.ended(job)
    assert (done["state"], done["attempts"], done["deaths"], done["kills"]) == ("done", 2, deaths, kills)
    assert np.array_equal(result(server, job), expected(LONG, 7))
    assert server.workers() != [worker]


def test_jobs_outlive_the_server(server, expected):
    running, waiting = (server.ask("POST", "/jobs", each)[1]["id"] for each in (LONG, ASKED))
    next(now for now in server.events(running) if now["state"] == "running" and now.get("step"))
    (worker,) = server.workers()
    server.kill()
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}"), "the process that computes ends with the server"
    server.start()
    server.wait_until_ready()
    for job, asked in ((running, LONG), (waiting, ASKED)):
        assert server.ended(job)["state"] == "done"
        assert np.array_equal(result(server, job), expected(asked, 7))


def test_settings_that_cannot_work_end_the_server(tmp_path):
    server = Server(tmp_path, str(tmp_path / "none"))
    assert server.process.wait(60) != 0
    assert "none" in server.said


def test_beyond_this_machine_a_key_is_asked_for(tmp_path):
    server = Server(tmp_path, "--host", "0.0.0.0")
    assert server.process.wait(60) != 0
    assert "--api-key-file" in server.said
