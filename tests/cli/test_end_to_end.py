"""`lowtide generate` with real pipelines: a tiny one of random weights, and the shipped model."""

import pytest
from PIL import Image, ImageStat
from tests import tiny
from typer.testing import CliRunner

from lowtide.cli.app import app

PROMPT = "a red sailboat on a calm sea at sunset"
SHORT = "sea"  # the tiny model reads 16 tokens, about one a letter


def lowtide(*arguments):
    return CliRunner().invoke(app, ["generate", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, in the published layout."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


def test_a_folder_a_scheduler_and_a_size(model, tmp_path):
    out = tmp_path / "x.png"
    options = f"--model {model} --steps 2 --size 48x32 --seed 3 --scheduler unipc --device cpu --out {out}"
    result = lowtide(SHORT, *options.split())
    assert result.exit_code == 0, result.output
    for stage in ("load", "encode prompt", "denoise", "decode"):
        assert stage in result.stderr
    with Image.open(out) as picture:
        assert picture.size == (48, 32)
        assert picture.text["scheduler"] == "UniPCMultistepScheduler"


def test_the_same_seed_gives_the_same_picture_and_another_does_not(model, tmp_path):
    pixels = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = f"--model {model} --steps 2 --seed {seed} --device cpu --out {tmp_path / name}.png"
        assert lowtide(SHORT, *options.split()).exit_code == 0
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels.append(picture.tobytes())
    assert pixels[0] == pixels[1] != pixels[2]


def test_a_folder_that_is_no_model(tmp_path):
    result = lowtide(SHORT, "--model", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "x.png"))
    assert result.exit_code in (1, 2)
    assert "model_index.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_variant_that_is_not_there(model, tmp_path):
    result = lowtide(SHORT, "--model", model, "--variant", "fp8", "--device", "cpu", "--out", str(tmp_path / "x.png"))
    assert result.exit_code in (1, 2)
    assert "fp8" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_shipped_model_draws_something(tmp_path):
    result = lowtide(PROMPT, "--steps", "8", "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "x.png"))
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (128, 128)
        assert max(ImageStat.Stat(picture).stddev) > 10
