"""What is refused of Stable Diffusion in one file, each with what to do."""

import json
import shutil

import pytest
import torch
from tests.fitting.fits import make
from tests.guests.single_file_cases import reading_no_weights
from tests.loading.original_files import published_shapes, write, write_sparse
from tests.pipelines.test_original_file import VAE, changed_file, from_file, from_folder

import lowtide
from lowtide.loading.original_file import FileOptions
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.weights.index import CheckpointError, UnsafeWeightsError


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return write("sd1", tmp_path_factory.mktemp("first"))


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        (r"it lacks model.diffusion_model.out.2.bias, for its UNet2DConditionModel. Get the file again if it",
            without("model.diffusion_model.out.2.bias")),
        ("it lacks first_stage_model.encoder.conv_out.weight, for its AutoencoderKL",
            without("first_stage_model.encoder.conv_out.weight")),
        ("it lacks cond_stage_model.transformer.text_model.final_layer_norm.bias",
            without("cond_stage_model.transformer.text_model.final_layer_norm.bias")),
        (r"its model.diffusion_model.out.2.bias is \[5\], which do not fit",
            lambda state: state.update({"model.diffusion_model.out.2.bias": torch.zeros(5)})),
        ("no network of such a model has model.diffusion_model.extra.weight. What was added to a model",
            lambda state: state.update({"model.diffusion_model.extra.weight": torch.zeros(5)})),
        ("no network of such a model has hypernetwork.0, hypernetwork.1, hypernetwork.2 and 2 more",
            lambda state: state.update({f"hypernetwork.{n}": torch.zeros(5) for n in range(5)})),
    ],
)  # fmt: skip
def test_weights_that_are_missing_strange_or_of_another_shape(first, tmp_path, said, change):
    file = changed_file(first, tmp_path, change)
    with pytest.raises(CheckpointError, match=said), reading_no_weights():
        from_file(first, file)


def test_networks_that_are_nowhere(first, tmp_path):
    for name, said in (
        (VAE, r"holds no VAE: give one, vae=FILE \(--vae FILE\), or its folder or Hub id"),
        ("cond_stage_model.", "holds no text encoder: give one, text_encoder="),
    ):
        shapes = {key: shape for key, shape in published_shapes("sd1").items() if not key.startswith(name)}
        file = write_sparse(shapes, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            StableDiffusionPipeline.from_single_file(file)
    own = changed_file(first, tmp_path, lambda state: [state.pop(name) for name in list(state) if VAE in name])
    assert torch.equal(make(from_file(first, own)), make(from_folder(first)))  # as the configurations' folder has it


def test_models_that_are_not_ours(first, tmp_path):
    inpaint = {**published_shapes("sd1"), "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    for said, shapes in (
        (r"is an inpainting model \(Stable Diffusion 1.x model\): it reads a mask.*lowtide.load\(FILE\)", inpaint),
        ("is a FLUX model. Lowtide's own pipelines", {"double_blocks.0.img_attn.qkv.weight": (4, 4)}),
        ("is a LoRA, and no model", {"lora_unet_x.lora_down.weight": (4, 4)}),
        ("another width than those that were published: give config=",
            {name: (8, 8) if "attn2.to_k" in name else shape for name, shape in published_shapes("sd1").items()}),
    ):  # fmt: skip
        file = write_sparse(shapes, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            StableDiffusionPipeline.from_single_file(file)
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, not a CogVideoXPipeline"):
        lowtide.CogVideoXPipeline.from_single_file(first.file, config=first.folder)


def test_arguments_that_are_not_possible(first, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    for error, said, file, arguments in (
        (UnsafeWeightsError, "is pickled", tmp_path / "model.ckpt", {}),
        (FileNotFoundError, "is no file. Give a .safetensors file", tmp_path / "nowhere.safetensors", {}),
        (FileNotFoundError, "is no file.* is loaded with from_pretrained", first.folder, {}),
        (TypeError, "has no 'original_config'.*give config=", first.file, {"original_config": "v1.yaml"}),
        (TypeError, "has no 'load_safety_checker'", first.file, {"load_safety_checker": True}),
        (ValueError, "prediction_type='noise': possible are epsilon", first.file, {"prediction_type": "noise"}),
        (ValueError, "variant='fp16' is for folders", first.file, {"variant": "fp16", "config": first.folder}),
    ):
        with pytest.raises(error, match=said):
            StableDiffusionPipeline.from_single_file(file, **arguments)
    with pytest.raises(ValueError, match=r"config='x' is for a file of weights; .* has its own"):
        StableDiffusionPipeline.from_pretrained(first.folder, file_options=FileOptions(config="x"))


def test_links_lead_to_files_on_the_hub(first, monkeypatch):
    asked = []

    def fetch(self, patterns):
        asked.append((self.name, self.revision, *patterns))
        return first.file.parent

    monkeypatch.setattr("lowtide.hub.Source.fetch", fetch)
    from lowtide.hub import Source, file_of_link

    for link in ("https://huggingface.co/a/b/blob/main/model.safetensors", "hf.co/a/b/model.safetensors"):
        assert file_of_link(Source(link)) == first.file
    assert asked == [("a/b", "main", "model.safetensors"), ("a/b", None, "model.safetensors")]


def test_a_configuration_of_another_model(first, tmp_path):
    folder = shutil.copytree(first.folder, tmp_path / "config")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(CheckpointError, match=r"it lacks model\.diffusion_model\.input_blocks"):
        StableDiffusionPipeline.from_single_file(first.file, config=folder)
