"""Folders of guests that are broken or ask for too much: one line names what is wrong, before anything is built."""

import json
import os
import shutil

import pytest
from tests.guests.families import FAMILIES
from tests.guests.guest_cases import WARNINGS

import lowtide
from lowtide.configs import CheckpointError

pytest.importorskip("diffusers")
pytestmark = WARNINGS


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    target = tmp_path_factory.mktemp("flux")
    FAMILIES["Flux2 Klein"]().pipeline.save_pretrained(str(target))
    return target


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def entries(part, **changes):
    """Changes in a component's configuration."""

    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def cut_off(folder):
    file = next((folder / "transformer").glob("*.safetensors"))
    os.truncate(file, 2000)


BROKEN = {
    "no configuration": (lambda folder: (folder / "vae/config.json").unlink(), "vae has no config.json"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder 'tokenizer'"),
    "no autoencoder": (lambda folder: shutil.rmtree(folder / "vae"), "has no folder 'vae'"),
    "no weights": (lambda folder: next((folder / "transformer").glob("*.safetensors")).unlink(), "has no .* weights"),
    "no JSON": (lambda folder: (folder / "transformer/config.json").write_text("{"), "config.json is not valid JSON"),
    "cut off": (cut_off, "transformer/.*: the header claims"),
    "millions of layers": (entries("transformer", num_layers=10**7), "a network of more than 8192 tensors"),
    "wide": (entries("text_encoder", hidden_size=10**9, head_dim=10**6), "has the shape .* asks for"),
    "wide in a table": (entries("text_encoder", head_dim=2**40), "text_encoder/"),
    "no tokens": (lambda folder: (folder / "tokenizer/tokenizer.json").write_text('{"model": 5}'), "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(folder, name):
    break_it, said = BROKEN[name]
    break_it(folder)
    with pytest.raises((CheckpointError, FileNotFoundError), match=said):
        lowtide.load(folder, ram="16GB", **FAMILIES["Flux2 Klein"]().call)


def test_a_file_does_not_choose_kernels_or_code(folder):
    entries("text_encoder", attn_implementation="someone/kernel", auto_map={"AutoModel": "code.Model"})(folder)
    (folder / "text_encoder" / "code.py").write_text("raise SystemExit('run')")
    pipe = lowtide.load(folder, ram="16GB", **FAMILIES["Flux2 Klein"]().call)
    assert pipe.text_encoder.config._attn_implementation in ("sdpa", "eager")
