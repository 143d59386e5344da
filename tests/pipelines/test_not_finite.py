"""NaN and infinity are told of, once, with the stage in which they arose."""

import math
import warnings

import pytest
import torch
from tests import tiny, tiny_video
from typer.testing import CliRunner

import lowtide
from lowtide.cli.app import app
from lowtide.pipelines.not_finite import NotFiniteWarning, is_finite

SPOILED = {"encode prompt": "text_encoder", "denoise": "unet", "decode": "vae"}


def spoil(module, value=math.nan):
    """One weight of the module's last layer is no number; returns what puts it back."""
    weight = [parameter for parameter in module.parameters() if parameter.ndim > 1][-1]
    before = weight.data.clone()
    weight.data[0] = value
    return lambda: weight.data.copy_(before)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tiny_video.write_checkpoint(tmp_path_factory.mktemp("clips") / "model")
    pipe = lowtide.CogVideoXPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def warned(run):
    """The stages that warnings name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    told = [str(warning.message) for warning in caught if warning.category is NotFiniteWarning]
    return [message.partition(":")[0] for message in told]


@pytest.mark.parametrize("stage", SPOILED)
@pytest.mark.parametrize("output", ["pt", "file"])
def test_the_first_stage_is_named_once(pipe, stage, output, tmp_path):
    options = {"num_inference_steps": 2, "output_type": output, "height": 16, "width": 16}
    path = {"output_path": tmp_path / "x.png"} if output == "file" else {}

    def run():
        return pipe("a boat", **options, **path)

    put_back = spoil(getattr(pipe, SPOILED[stage]))
    assert warned(run) == [stage]
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFiniteWarning)
        with pytest.raises(NotFiniteWarning, match="bfloat16"):
            run()
    put_back()
    assert warned(run) == [], "and not in the next run"


@pytest.mark.parametrize("stage", SPOILED)
def test_of_clips_too(clips, stage):
    name = {**SPOILED, "denoise": "transformer"}[stage]

    def run():
        return clips("a panda", num_inference_steps=2, output_type="pt", max_sequence_length=tiny_video.MAX_TOKENS)

    put_back = spoil(getattr(clips, name), math.inf)
    assert warned(run) == [stage]
    put_back()
    assert warned(run) == []


def test_latents_that_are_given_out_are_looked_at_and_those_of_a_file(pipe, tmp_path):
    put_back = spoil(pipe.unet)
    asked = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    assert warned(lambda: pipe("a boat", **asked)) == ["denoise"]
    put_back()
    assert warned(lambda: pipe("a boat", **asked)) == []


def test_the_command_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.pipeline(tmp_path / "words")
    spoil(pipe.vae)
    pipe.save_pretrained(tmp_path / "model")
    command = f"generate sea --model {tmp_path / 'model'} --steps 1 --size 16 --device cpu --out x.png"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert "Error: decode: numbers that are NaN or infinite came out of it, in float32" in result.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_is_found_wherever_it_is(value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for place in (0, 500, 999):
            numbers = torch.zeros(1000, dtype=dtype)
            assert is_finite(numbers)
            numbers[place] = value
            assert not is_finite(numbers)
    assert is_finite(torch.full((10,), torch.finfo(torch.float16).max, dtype=torch.float16))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.zeros(3, device="meta"))
