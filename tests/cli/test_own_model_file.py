"""`lowtide plan`, `generate` and `decode` with Stable Diffusion in one file, run by Lowtide's own pipeline."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.fitting.fits import traced_once  # noqa: F401
from tests.loading.original_files import published_shapes, save, write, write_sparse
from typer.testing import CliRunner

from lowtide.cli.app import app

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="budgets are held by what /proc tells"),
    pytest.mark.usefixtures("traced_once"),
]
CALL = ("--size", "32", "--steps", "2", "--seed", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write("sd1", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def lowtide(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(each) for each in arguments])


def drawn(out, *arguments):
    result = lowtide("generate", "sea", "--out", out, *CALL, *arguments)
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        return picture.tobytes(), picture.text


def test_the_picture_is_that_of_the_folder(written, tmp_path):
    expected, _ = drawn(tmp_path / "folder.png", "--model", written.folder, "--dtype", "float32")
    own = ("--model", written.file, "--config", written.folder, "--dtype", "float32")
    for number, options in enumerate(((), ("--ram", "16GB"), ("--offload", "leaf"))):
        picture, text = drawn(tmp_path / f"{number}.png", *own, *options)
        assert picture == expected
        assert text["model"] == "model.safetensors"
        assert "pipeline" not in text


def test_a_vae_beside_it(written, tmp_path):
    state = load_file(written.file)
    vae = {name: x for name, x in state.items() if name.startswith("first_stage_model.")}
    beside = save({name: 2 * x for name, x in vae.items()}, tmp_path / "vae.safetensors")
    alone = save({name: x for name, x in state.items() if name not in vae}, tmp_path / "no-vae.safetensors")
    expected, _ = drawn(tmp_path / "folder.png", "--model", written.folder, "--vae", beside)
    own, _ = drawn(tmp_path / "own.png", "--model", written.folder)
    found, _ = drawn(
        tmp_path / "file.png", "--model", alone, "--config", written.folder, "--vae", beside, "--ram", "16GB"
    )
    assert found == expected != own


def test_what_is_planned(written, tmp_path):
    result = lowtide("plan", written.file, "--config", written.folder, "--ram", "16GB", "--json", *CALL[:4])
    assert result.exit_code == 0, result.output
    assert {"unet", "vae", "text_encoder"} <= json.loads(result.stdout)["chosen"]["components"].keys()
    vae = save({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    result = lowtide("plan", written.file, "--config", written.folder, "--vae", vae)
    assert result.exit_code == 2
    assert "it lacks encoder.conv_in.weight" in result.output


@pytest.mark.parametrize(("kind", "size"), [("sd1", "512x512"), ("sd2", "768x768")])
def test_published_sizes_are_planned_from_a_header_alone(tmp_path, kind, size):
    file = write_sparse(published_shapes(kind), tmp_path / "model.safetensors")
    result = lowtide("plan", file, "--ram", "4GB", "--device", "cpu", "--dtype", "float32", "--steps", "20")
    assert result.exit_code == 0, result.output
    assert f"model.safetensors: {size}" in result.output
    assert file.stat().st_blocks * 512 < 2**20


def test_latents_that_were_kept_are_decoded_with_what_was_beside_the_file(written, tmp_path, monkeypatch):
    from lowtide.models.vae import AutoencoderKL

    options = ("--model", "model.safetensors", "--config", "config", "--dtype", "float32", "--ram", "16GB")
    (tmp_path / "model.safetensors").symlink_to(written.file)
    (tmp_path / "config").symlink_to(written.folder)
    expected, _ = drawn(tmp_path / "whole.png", *options)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "decode_rows", stopped)
        patch.setattr(AutoencoderKL, "decode", stopped)
        result = lowtide("generate", "sea", "--out", "late.png", *CALL, *options)
    assert result.exit_code == 130, result.output
    latents = result.output.partition("lowtide decode ")[2].split()[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = lowtide("decode", latents)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "late.png") as picture:
        assert picture.tobytes() == expected


def test_what_is_refused(written, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    lora = save({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    vae = save({"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    shapes = {name: shape for name, shape in published_shapes("sd1").items() if "first_stage" not in name}
    no_vae = write_sparse(shapes, tmp_path / "no-vae.safetensors")
    own = ("--config", written.folder)
    for said, *arguments in (
        ("is pickled, and unpickling a file can run code", "plan", tmp_path / "model.ckpt"),
        ("is a LoRA, and no model", "plan", lora),
        ("is a VAE alone, and no whole model. Give it beside a model: vae=FILE (--vae FILE)", "plan", vae),
        ("holds no VAE: give one, vae=FILE (--vae FILE)", "plan", no_vae, "--ram", "4GB"),
        ("reads states of another width", "plan", written.file),
        ("there is no such file", "plan", written.file, *own, "--vae", "nothing.safetensors"),
        ("no such folder", "plan", written.file, "--config", "nowhere"),
        ("prediction_type='noise'", "plan", written.file, *own, "--prediction", "noise"),
        ("is for a .safetensors file", "plan", written.folder, "--prediction", "epsilon"),
        ("makes pictures: leave out --video", "generate", "sea", "--model", written.file, *own, "--video"),
        ("--image x.png: model.safetensors is loaded by a pipeline of Lowtide's own", "plan", written.file, *own,
            "--image", "x.png"),
    ):  # fmt: skip
        result = lowtide(*arguments)
        assert result.exit_code == 2, (said, result.output)
        assert said in " ".join(result.output.split()), (said, result.output)
