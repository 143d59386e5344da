"""Pipelines saved by the peer load here, and ours load there: one file or shards, fp32 or fp16; equal pictures."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.parity import pairs

from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
    pytest.mark.filterwarnings("ignore:The safety checker blackened:UserWarning"),
]

TOLERANCE = 1 / 255 / 16
LAYOUTS = [
    (torch.float32, None, None),
    (torch.float32, None, "100KB"),
    pytest.param(torch.float16, None, None, marks=pytest.mark.slow),
    (torch.float16, "fp16", None),
    (torch.float16, "fp16", "50KB"),
]
NETWORKS = ("unet", "vae", "text_encoder", "safety_checker")


def their_pipeline(ours):
    """The peer's pipeline with our weights and files."""
    theirs = diffusers.StableDiffusionPipeline(
        unet=pairs.unets(**tiny.FEW_BLOCKS)[1],
        vae=pairs.vaes()[1],
        text_encoder=pairs.of_transformers(ours.text_encoder),
        tokenizer=pairs.of_transformers(ours.tokenizer),
        scheduler=diffusers.PNDMScheduler.from_config(ours.scheduler.config.to_dict()),
        safety_checker=pairs.safety_checkers()[1],
        feature_extractor=pairs.of_transformers(ours.feature_extractor),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return tiny.pipeline(folder, checker=True, schedule=tiny.scheduler("PNDMScheduler"))


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a boat", num_inference_steps=2, generator=tiny.seeded(3), output_type="np")
    return output.images, output.nsfw_content_detected


def assert_same_picture(one, other):
    (a, seen), (b, seen_there) = picture(one), picture(other)
    assert np.abs(a - b).max() <= TOLERANCE
    assert seen == seen_there == [False]
    assert b.std() > 0.05


def shards_of(folder):
    return [len(list((folder / name).glob("*.safetensors"))) for name in NETWORKS]


@pytest.mark.parametrize(("dtype", "variant", "shard_size"), LAYOUTS)
def test_peer_saves_and_we_load(tmp_path, ours, dtype, variant, shard_size):
    source = their_pipeline(ours).to(dtype)
    source.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size or "5GB")
    assert (max(shards_of(tmp_path)) > 1) == (shard_size is not None)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant=variant, torch_dtype="auto")
    assert type(loaded) is StableDiffusionPipeline
    assert loaded.dtype == dtype
    for name in NETWORKS:
        state, expected = getattr(loaded, name).state_dict(), getattr(source, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), name
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, dtype=torch.float32)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    assert_same_picture(loaded, theirs)


@pytest.mark.parametrize(("dtype", "variant", "shard_size"), LAYOUTS)
def test_we_save_and_peer_loads(tmp_path, dtype, variant, shard_size):
    source = tiny.pipeline(tmp_path / "words", checker=True).to(dtype)
    source.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    assert (max(shards_of(tmp_path)) > 1) == (shard_size is not None)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, dtype=dtype)
    for name in NETWORKS:
        state, expected = getattr(theirs, name).state_dict(), getattr(source, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), name
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, dtype=torch.float32)
    assert_same_picture(StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant), theirs)


def test_comparison_sees_a_changed_file(tmp_path, ours):
    """Negative control: one tensor of the file is changed between the peer's reading and ours."""
    their_pipeline(ours).save_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["conv_out.bias"] += 0.1
    save_file(tensors, file, {"format": "pt"})
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert np.abs(picture(loaded)[0] - picture(theirs)[0]).max() > TOLERANCE
    assert not torch.equal(loaded.unet.conv_out.bias, theirs.unet.conv_out.bias)


ALONE = {
    "unet": functools.partial(pairs.unets, **tiny.FEW_BLOCKS),
    "vae": pairs.vaes,
    **{f"transformer {kind}": functools.partial(pairs.video_transformers, kind) for kind in tiny.TRANSFORMERS},
}


@pytest.mark.parametrize("part", ALONE)
def test_a_model_alone_crosses_both_ways(tmp_path, part):
    ours, theirs = ALONE[part]()
    ours.save_pretrained(tmp_path / "ours" / part)
    theirs.save_pretrained(tmp_path / "theirs" / part)
    there = type(theirs).from_pretrained(tmp_path / "ours", subfolder=part)
    here = type(ours).from_pretrained(tmp_path / "theirs", subfolder=part)
    expected = ours.state_dict()
    for state in (there.state_dict(), here.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    known = {key: value for key, value in theirs.config.items() if not key.startswith("_") and key in here.config}
    assert json.dumps(known) == json.dumps({key: here.config[key] for key in known})


def test_the_index_that_we_write_is_the_peers(tmp_path, ours):
    """Entry by entry, but for two that only the peer has."""
    ours.save_pretrained(tmp_path / "ours")
    their_pipeline(ours).save_pretrained(tmp_path / "theirs")
    mine, other = (json.loads((tmp_path / who / "model_index.json").read_text()) for who in ("ours", "theirs"))
    assert other.pop("requires_safety_checker") is True
    assert other.pop("image_encoder") == [None, None]
    other.pop("_name_or_path", None)
    other["feature_extractor"][1] = other["feature_extractor"][1].removesuffix("Pil")  # so where torchvision is missing
    assert mine == other


def test_parts_of_the_peer_can_be_passed_in(tmp_path, ours):
    """A U-Net and an autoencoder of the peer work in our pipeline as they are."""
    theirs = their_pipeline(ours)
    ours.save_pretrained(tmp_path)
    mixed = StableDiffusionPipeline.from_pretrained(tmp_path, unet=theirs.unet, vae=theirs.vae)
    assert mixed.unet is theirs.unet
    assert_same_picture(mixed, theirs)
