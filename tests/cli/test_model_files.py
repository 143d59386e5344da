"""`lowtide plan` and `lowtide generate` with a whole pipeline in one file."""

import json

import pytest
from tests.cli.test_guests import PROMPT, SIZE, lowtide, place
from tests.guests import original_names
from tests.guests.families_unets import stable_diffusion
from tests.guests.single_file_cases import written

pytest.importorskip("diffusers")
__all__ = ["place"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    family = stable_diffusion()
    return written(family, original_names.stable_diffusion(family.pipeline), tmp_path_factory.mktemp("model"))


def test_a_file_is_planned(model):
    result = lowtide("plan", model.file, "--config", model.config, "--ram", "16GB", "--json", *SIZE)
    assert result.exit_code == 0, result.output
    assert {"unet", "vae", "text_encoder"} <= json.loads(result.stdout)["chosen"]["components"].keys()


def test_pictures_are_made_from_a_file(model, tmp_path):
    result = lowtide("generate", PROMPT, "--model", model.file, "--config", model.config, "--ram", "16GB", "--out",
        tmp_path / "boat.png", *SIZE)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "whole.safetensors (StableDiffusionPipeline)" in result.output
    assert (tmp_path / "boat.png").is_file()


def test_what_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    for said, *arguments in (
        ("is for a .safetensors file", "plan", model.config, "--config", model.config),
        ("or a .safetensors file of a whole pipeline", "plan", tmp_path / "old.ckpt"),
        ("of no pipeline that diffusers knows. Give config= (--config)", "plan", model.file),
        ("at least 8 bytes", "plan", tmp_path / "bad.safetensors"),
    ):
        result = lowtide(*arguments)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())
