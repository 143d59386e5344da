"""The dtype of pipelines of ours: the fastest on made-up processors, without float16 where it overflows."""

import json

import pytest
import torch
from tests.fitting import fits
from tests.fitting.fits import bare_machine  # noqa: F401
from tests.planning import processors

import lowtide
from lowtide.hub import Source
from lowtide.pipelines.own_dtype import own_dtypes


@pytest.fixture
def folder(tmp_path):
    return fits.checkpoint(tmp_path, "pictures")


def deny_overflows(folder):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "force_upcast": False}))


def test_the_fastest_is_first(folder, monkeypatch):
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    assert own_dtypes(Source(str(folder)), "cpu")[0] == "bfloat16"
    processors.use(monkeypatch, processors.FOR_FLOAT32)
    assert own_dtypes(Source(str(folder)), "cpu") == ("float32", "bfloat16")


def test_float16_is_possible_where_the_model_denies_that_it_overflows(folder, monkeypatch, tmp_path):
    processors.use(monkeypatch, processors.speeds(float32=3, bfloat16=2, float16=1))
    assert own_dtypes(Source(str(folder)), "cpu") == ("bfloat16", "float32")
    deny_overflows(folder)
    assert own_dtypes(Source(str(folder)), "cpu") == ("float16", "bfloat16", "float32")
    clips = fits.checkpoint(tmp_path / "clips", "clips")
    assert "float16" not in own_dtypes(Source(str(clips)), "cpu")


def test_an_accelerator_computes_in_float16(folder):
    assert own_dtypes(Source(str(folder)), "cuda") == ("float16",)


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("ram", ["8GB", 1_500_000])
def test_what_is_loaded_computes_in_it_and_rests_as_the_file_has_it(folder, monkeypatch, ram):
    def latents(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a", height=16, width=16, num_inference_steps=2, output_type="latent", generator=generator).images

    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    asked = {"height": 16, "width": 16, "steps": 2, "device": "cpu"}
    pipe = lowtide.load(folder, ram=ram, **asked)
    assert pipe.dtype == torch.bfloat16
    assert pipe.plan.dtype == "bfloat16"
    explicit = lowtide.load(folder, ram=ram, dtype=torch.bfloat16, **asked)
    assert torch.equal(latents(pipe), latents(explicit))
    assert lowtide.load(folder, ram=ram, dtype="auto", **asked).dtype == torch.float32


@pytest.mark.usefixtures("bare_machine")
def test_a_slow_one_that_is_asked_for_is_warned_of(folder, monkeypatch):
    processors.use(monkeypatch, processors.FOR_FLOAT32)
    with pytest.warns(UserWarning, match="bfloat16 is slow on this processor: .*60 times"):
        lowtide.load(folder, ram="8GB", dtype="bfloat16", device="cpu")
