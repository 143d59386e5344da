"""`lowtide serve` with the options for who keeps it running: a folder of models, a log of JSON, an end by SIGTERM."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.serve.server import Server
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.cli.request import shipped_model

pytest.importorskip("fastapi")
PROMPT = "a secret boat"


def test_a_server_in_operation(tmp_path):
    models = tmp_path / "models"
    for name in ("first", "second"):
        shutil.copytree(str(shipped_model()), models / name)
    options = (
        "--models-dir",
        str(models),
        "--ram",
        "900MB",
        "--log",
        "json",
        "--keep-days",
        "1",
        "--keep-bytes",
        "1GB",
    )
    server = Server(tmp_path / "data", *options)
    server.wait_until_ready()
    assert [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]] == ["first", "second"]
    asked = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 2, "model": "second"}
    status, job = server.ask("POST", "/jobs", asked, X_Request_ID="ours")
    assert status == 202
    assert server.ended(job["id"])["state"] == "done"
    figures = server.ask("GET", "/metrics")[1].decode()
    for name in ("job_seconds_count", "job_peak_ratio_count", "jobs_ended_total"):
        assert f'lowtide_{name}{{model="second"' in figures
    assert 'lowtide_stage_seconds_total{model="second",stage="denoise"}' in figures
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.said.splitlines()]
    assert {"lowtide.serve", "uvicorn.error"} <= {line["logger"] for line in lines}
    ours = [line["message"] for line in lines if line.get("request") == "ours"]
    assert {"POST /jobs 202", "job taken", "job begun", "job done"} <= set(ours)
    assert PROMPT not in server.said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keep-bytes", "much"], "--keep-bytes"),
        (["--keep-days", "-1"], "--keep-days"),
        (["--models-dir", "/nowhere"], "/nowhere"),
        (["--log", "xml"], "--log"),
    ],
)
def test_options_that_cannot_be_are_refused(options, told):
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    assert told in result.output
