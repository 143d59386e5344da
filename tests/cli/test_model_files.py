"""`lowtide plan` and `lowtide generate` with a whole pipeline of diffusers in one file."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.cli.test_guests import PROMPT, SIZE, lowtide, place
from tests.guests import original_names
from tests.guests.single_file_cases import sdxl, written

pytest.importorskip("diffusers")
__all__ = ["place"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    family = sdxl()
    return written(family, original_names.sdxl(family.pipeline), tmp_path_factory.mktemp("model"))


def test_a_file_is_planned(model):
    result = lowtide("plan", model.file, "--config", model.config, "--ram", "16GB", "--json", *SIZE)
    assert result.exit_code == 0, result.output
    assert {"unet", "vae", "text_encoder"} <= json.loads(result.stdout)["chosen"]["components"].keys()


def test_pictures_are_made_from_a_file(model, tmp_path):
    result = lowtide("generate", PROMPT, "--model", model.file, "--config", model.config, "--ram", "16GB", "--out",
        tmp_path / "boat.png", *SIZE)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "whole.safetensors (StableDiffusionXLPipeline)" in result.output
    assert (tmp_path / "boat.png").is_file()


def test_what_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    for said, *arguments in (
        ("is for a .safetensors file", "plan", model.config, "--config", model.config),
        ("is pickled, and unpickling a file can run code", "plan", tmp_path / "old.ckpt"),
        ("or a .safetensors file of a whole pipeline", "plan", tmp_path / "notes.txt"),
        ("of no pipeline that diffusers knows. Give config= (--config)", "plan", tmp_path / "other.safetensors"),
        ("--vae x is for Stable Diffusion", "plan", model.file, "--config", model.config, "--vae", "x"),
        ("at least 8 bytes", "plan", tmp_path / "bad.safetensors"),
    ):
        result = lowtide(*arguments)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())
