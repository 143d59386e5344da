"""`lowtide plan` and `lowtide generate --ram` with a real pipeline of random weights."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.fitting import fits
from typer.testing import CliRunner

from lowtide.cli.app import app

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="budgets are held by what /proc tells")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    fits.small(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


def lowtide(*arguments):
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, list(arguments))


def test_a_plan_is_made_without_any_weights(model):
    for weights in _weights(model):
        weights.rename(weights.with_suffix(".away"))
    try:
        result = lowtide("plan", model, "--ram", "64GB", "--device", "cpu", "--json")
    finally:
        for weights in _weights(model, ".away"):
            weights.rename(weights.with_suffix(".safetensors"))
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["chosen"]["peak"] <= 64 * 10**9
    assert content["curve"][0]["budget"] == content["minimum"]["ram"]


def test_a_refusal_names_a_minimum(model):
    result = lowtide("plan", model, "--ram", "10MB", "--device", "cpu")
    assert result.exit_code == 2
    assert "Try --ram " in result.stderr


def test_a_budget_leads_a_run_from_its_plan_to_its_report(model, tmp_path):
    out, timeline = tmp_path / "x.png", tmp_path / "t.png"
    options = f"--model {model} --steps 2 --size 32 --seed 3 --ram 64GB --device cpu --out {out} --timeline {timeline}"
    result = lowtide("generate", "sea", *options.split())
    assert result.exit_code == 0, result.output
    order = ["Plan: ", "denoise 1/2 ", "denoise 2/2 ", "of bound", "within the budget of 64.00 GB"]
    places = [result.stderr.index(said) for said in order]
    assert places == sorted(places)
    for path in (out, timeline):
        with Image.open(path) as picture:
            assert picture.width >= 32


def _weights(model, suffix=".safetensors"):

    return list(Path(model).rglob(f"*{suffix}"))
