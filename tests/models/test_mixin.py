"""Models alone: `from_pretrained` and `save_pretrained`, dtypes, variants, and weights that are views of the file."""

import json
import sys

import pytest
import torch
from tests import tiny

from lowtide.models import mixin
from lowtide.models.load_arguments import chosen_dtype
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.weights.fill import WeightsMismatchError
from lowtide.weights.index import CheckpointError, UnsafeWeightsError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def folder(tmp_path):
    tiny.vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change(file, **entries):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **entries}))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shard_size", [None, 40_000, "60KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_round_trip(tmp_path, dtype, shard_size, variant):
    model = tiny.vae().to(dtype)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size is not None)
    loaded = AutoencoderKL.from_pretrained(tmp_path, variant=variant, torch_dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.config == model.config
    assert not loaded.training
    assert same_state(loaded, model)
    other = tiny.set_weights(AutoencoderKL.from_config(tiny.VAE), 1).to(dtype)
    assert not same_state(loaded, other)  # negative control


@pytest.mark.parametrize("saved", FLOATS)
@pytest.mark.parametrize("asked", FLOATS)
def test_dtype_is_converted_as_torch_does(tmp_path, saved, asked):
    model = tiny.vae().to(saved)
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoencoderKL.from_pretrained(tmp_path, torch_dtype=asked),
        AutoencoderKL.from_pretrained(tmp_path, dtype=str(asked)),
    ):
        assert loaded.dtype == asked
        assert same_state(loaded, model.to(asked))


@pytest.mark.parametrize(
    ("torch_dtype", "dtype", "expected"),
    [
        (None, None, torch.float32),
        (torch.float16, None, torch.float16),
        (None, torch.bfloat16, torch.bfloat16),
        ("float16", None, torch.float16),
        (None, "torch.bfloat16", torch.bfloat16),
        (None, "half", torch.float16),
        ("auto", None, None),
        (None, "auto", None),
        (torch.float16, torch.float16, torch.float16),
        ("float16", torch.float16, torch.float16),
        ("auto", "auto", None),
    ],
)
def test_the_dtype_asked_for(torch_dtype, dtype, expected):
    assert chosen_dtype(torch_dtype, dtype) is expected


@pytest.mark.parametrize(
    ("torch_dtype", "dtype", "message"),
    [
        (torch.float16, torch.float32, "torch_dtype=torch.float16 and dtype=torch.float32 differ"),
        ("auto", torch.float32, "differ; give one of them"),
        ("float17", None, "dtype='float17' is not possible: give torch.float32"),
        (None, "int8", "dtype='int8' is not possible"),
        (None, torch.int64, "dtype=torch.int64 is not possible"),
        (None, "nn", "dtype='nn' is not possible"),
        (None, 16, "dtype=16 is not possible"),
    ],
)
def test_a_dtype_that_is_not_possible(folder, torch_dtype, dtype, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_pretrained(folder, torch_dtype=torch_dtype, dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_the_dtype_asked_for_are_views_of_the_file(folder, tmp_path):
    AutoencoderKL.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert tiny.mapped_files(loaded) == {str(tmp_path / WEIGHTS)}
    converted = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16)  # negative control
    assert str(tmp_path / WEIGHTS) not in tiny.mapped_files(converted)


@pytest.mark.parametrize("shard_size", [None, 40_000])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_model_can_be_saved_over_the_folder_that_it_was_loaded_from(tmp_path, shard_size, variant):
    tiny.vae().save_pretrained(tmp_path, variant=variant)
    loaded = AutoencoderKL.from_pretrained(tmp_path, variant=variant)
    expected = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    again = AutoencoderKL.from_pretrained(tmp_path, variant=variant)
    for model in (loaded, again):
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_write_to_a_weight_stays_in_the_process(folder):
    before = (folder / WEIGHTS).read_bytes()
    loaded = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert (folder / WEIGHTS).read_bytes() == before
    assert same_state(AutoencoderKL.from_pretrained(folder), tiny.vae())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch, error):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mixin, "save_tensors", fail)
    with pytest.raises(error):
        tiny.set_weights(AutoencoderKL.from_config(tiny.VAE), 1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert same_state(AutoencoderKL.from_pretrained(folder), tiny.vae())


def test_a_subfolder(folder):
    loaded = AutoencoderKL.from_pretrained(folder.parent, subfolder="vae")
    assert same_state(loaded, tiny.vae())
    with pytest.raises(FileNotFoundError, match=r"unet has no config.json"):
        AutoencoderKL.from_pretrained(folder.parent, subfolder="unet")


def test_a_missing_variant_lists_those_that_are_there(tmp_path):
    tiny.vae().save_pretrained(tmp_path)
    tiny.vae().save_pretrained(tmp_path, variant="fp16", max_shard_size=40_000)
    with pytest.raises(FileNotFoundError, match=r"variant 'bf16' .*There are: variant=None, variant='fp16'"):
        AutoencoderKL.from_pretrained(tmp_path, variant="bf16")


def test_pickled_weights_are_refused(folder):
    with pytest.raises(ValueError, match="use_safetensors=False is not possible: pickled weights can run code"):
        AutoencoderKL.from_pretrained(folder, use_safetensors=False)
    assert same_state(AutoencoderKL.from_pretrained(folder, use_safetensors=None), tiny.vae())
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeWeightsError, match=r"only pickled ones \(diffusion_pytorch_model.bin\)"):
        AutoencoderKL.from_pretrained(folder)


def test_the_class_of_another_model(folder):
    with pytest.raises(ValueError, match="holds a AutoencoderKL, not a UNet2DConditionModel: load it with that class"):
        UNet2DConditionModel.from_pretrained(folder)
    change(folder / "config.json", _class_name=["AutoencoderKL"])
    with pytest.raises(ValueError, match="not a AutoencoderKL"):
        AutoencoderKL.from_pretrained(folder)


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json, so it is not a AutoencoderKL checkpoint"):
        AutoencoderKL.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\0", '{"a": 1} x', "[" * 100_000])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json (is not valid JSON|must hold a JSON object)"):
        AutoencoderKL.from_pretrained(folder)


def test_a_config_of_other_shapes_lists_both_sides(folder):
    change(folder / "config.json", latent_channels=3)
    with pytest.raises(WeightsMismatchError, match="Different in the two") as caught:
        AutoencoderKL.from_pretrained(folder)
    assert "quant_conv.weight: [6, 6, 1, 1] in the model, [8, 8, 1, 1] in the file" in str(caught.value)
    assert str(folder / WEIGHTS) in str(caught.value)
    change(folder / "config.json", latent_channels=4, layers_per_block=2)
    with pytest.raises(WeightsMismatchError, match="In the model, not in the file"):
        AutoencoderKL.from_pretrained(folder)


def test_weights_that_are_cut_short(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated: 100 bytes are missing"):
        AutoencoderKL.from_pretrained(folder)


def test_old_names_of_the_autoencoders_attention(folder):
    """Files of 2022 call the projections query, key, value and proj_attn, some as 1x1 convolutions."""
    from safetensors.torch import load_file, save_file

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name in [name for name in tensors if "attentions.0.to_" in name]:
        tensor, new = tensors.pop(name), next(new for new in old if f".{new}." in name)
        tensors[name.replace(new, old[new])] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, folder / WEIGHTS)
    assert same_state(AutoencoderKL.from_pretrained(folder), tiny.vae())


def test_a_loaded_model_needs_no_gradient_and_computes(folder):
    loaded = AutoencoderKL.from_pretrained(folder)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    z = tiny.numbers((1, 4, 4, 6))
    assert tiny.difference(loaded.decode(z).sample, tiny.vae().decode(z).sample) < 1e-5
