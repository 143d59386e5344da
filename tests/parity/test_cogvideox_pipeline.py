"""Whole clips, ours against the peer's: the same weights, seeds and arguments; and checkpoints that cross both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests import tiny, tiny_video
from tests.parity import pairs
from tests.thinned import covering, thinned

from lowtide.pipelines import cogvideox
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.cogvideox import CogVideoXPipeline

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:num_frames=:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
]

TOLERANCE = 1e-5
"""Of a scale from 0 to 1; 1/255 would do."""
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
OTHERS = ("DDIMScheduler", "DPMSolverMultistepScheduler")
KINDS = list(tiny_video.TRANSFORMERS)
PROMPTS = ["a red panda plays", "night"]
NETWORKS = ("text_encoder", "vae", "transformer")
VAE_BLOCKS = {
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
}


def their_pipeline(ours, kind, name=None):
    """The peer's pipeline with our weights and vocabulary."""
    theirs = diffusers.CogVideoXPipeline(
        tokenizer=pairs.of_transformers(ours.tokenizer),
        text_encoder=pairs.of_transformers(ours.text_encoder),
        vae=_like(diffusers.AutoencoderKLCogVideoX(**tiny_video.VAE, **VAE_BLOCKS), ours.vae),
        transformer=_like(diffusers.CogVideoXTransformer3DModel(**tiny_video.TRANSFORMERS[kind]), ours.transformer),
        scheduler=getattr(diffusers, name or type(ours.scheduler).__name__).from_config(
            ours.scheduler.config.to_dict()
        ),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def _like(theirs, ours):
    theirs.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()})
    return pairs.same_weights(ours, theirs.eval())[1]


def pair(folder, kind="5b", name=SCHEDULERS[0], **schedule):
    ours = tiny_video.pipeline(folder, kind, tiny_video.scheduler(name, **schedule))
    return ours, their_pipeline(ours, kind)


@pytest.fixture(scope="module")
def each(request, tmp_path_factory):
    return pair(tmp_path_factory.mktemp("each"), request.param)


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    return pair(tmp_path_factory.mktemp("both"), name=request.param)


def film(pipe, **call):
    """A clip of 16x32 pixels in three steps, unless `call` says otherwise; generators are made from seeds."""
    seeds = call.pop("seeds", (3,))
    defaults = {
        "prompt": PROMPTS[0],
        "height": 16,
        "width": 32,
        "num_inference_steps": 3,
        "output_type": "np",
        "max_sequence_length": tiny_video.MAX_TOKENS,
    }
    frames = pipe(**{**defaults, "generator": tiny.seeded(*seeds), **call}).frames
    return frames.float().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)


def worst(ours, theirs):
    """The largest difference of any channel of any pixel, on a scale from 0 to 1."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05, "a flat picture proves nothing"
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


WIDTH, TOKENS = tiny_video.TEXT_WIDTH, tiny_video.MAX_TOKENS
EMBEDS = {"prompt": None, "prompt_embeds": tiny.numbers((2, TOKENS, WIDTH), 7)}
CALLS = {
    "guidance": {},
    "no guidance": {"guidance_scale": 1.0},
    "weak guidance": {"guidance_scale": 1.5, "negative_prompt": "sea"},
    "dynamic guidance": {"use_dynamic_cfg": True, "num_inference_steps": 4},
    "several prompts": {"prompt": PROMPTS, "negative_prompt": ["fog", ""]},
    "a generator for each": {"prompt": PROMPTS, "seeds": (5, 6)},
    "another size": {"height": 32, "width": 16, "num_frames": 8},
    "the usual size": {"height": None, "width": None},
    "one frame": {"num_frames": 1},
    "more frames": {"num_frames": 17},
    "a number of frames that is not made": {"num_frames": 13},
    "embeddings given": {**EMBEDS, "negative_prompt_embeds": tiny.numbers((2, TOKENS, WIDTH), 8)},
    "embeddings given, no guidance": {**EMBEDS, "guidance_scale": 0.0},
    "noise in each step": {"eta": 0.7},
    "noise in each step, a generator for each": {"prompt": PROMPTS, "eta": 1.0, "seeds": (5, 6)},
    "one step": {"num_inference_steps": 1},
    "five steps": {"num_inference_steps": 5},
}
FOR_EVERY_KIND = ("guidance", "the usual size", "dynamic guidance", "another size", "one frame", "more frames")


@pytest.mark.parametrize(("each", "name"), thinned(KINDS, FOR_EVERY_KIND, most=2), indirect=["each"], scope="module")
def test_same_clip_of_every_kind(each, name):
    ours, theirs = each
    assert worst(film(ours, **CALLS[name]), film(theirs, **CALLS[name])) <= TOLERANCE


@pytest.mark.parametrize(("name", "both"), thinned(CALLS, SCHEDULERS), indirect=["both"], scope="module")
def test_same_clip_with_both_schedulers(both, name):
    ours, theirs = both
    assert worst(film(ours, **CALLS[name]), film(theirs, **CALLS[name])) <= TOLERANCE


@pytest.mark.parametrize(
    ("output_type", "both"),
    thinned(["pil", "np", "pt", "latent"], SCHEDULERS),
    indirect=["both"],
    scope="module",
)
def test_same_output_of_each_type(both, output_type):
    ours, theirs = (film(pipe, output_type=output_type, prompt=PROMPTS) for pipe in both)
    scale = 255 if output_type == "pil" else 1
    assert ours.dtype == theirs.dtype
    difference = scale * worst(ours / scale, theirs / scale)
    assert round(difference) <= 1 if output_type == "pil" else difference <= TOLERANCE  # grey levels are whole


@pytest.mark.parametrize("each", KINDS, indirect=True)
def test_latents_given(each):
    ours, theirs = each
    noise = 1.7 * tiny.numbers(ours.latent_shape(1, 9, 16, 32), 4)
    assert worst(film(ours, latents=noise), film(theirs, latents=noise)) <= TOLERANCE


@pytest.mark.parametrize("both", [SCHEDULERS[0], pytest.param(SCHEDULERS[1], marks=pytest.mark.slow)], indirect=True)
def test_several_clips_of_each_prompt(both):
    """The peer of this version makes one clip of each prompt, whatever is asked for: it is given prompts twice."""
    ours, theirs = both
    seeds = (5, 6, 7, 8)
    twice = {"prompt": [prompt for prompt in PROMPTS for _ in range(2)], "negative_prompt": ["fog", "fog", "x", "x"]}
    expected = film(theirs, **twice, seeds=seeds)
    made = film(ours, prompt=PROMPTS, negative_prompt=["fog", "x"], num_videos_per_prompt=2, seeds=seeds)
    assert worst(made, expected) <= TOLERANCE
    swapped = film(ours, prompt=PROMPTS, negative_prompt=["fog", "x"], num_videos_per_prompt=2, seeds=(5, 7, 6, 8))
    assert worst(swapped, expected) > TOLERANCE  # negative control


@pytest.mark.parametrize(
    ("call", "name"), thinned(["guidance", "no guidance", "noise in each step", "five steps"], OTHERS)
)
def test_same_clip_with_other_schedulers(tmp_path, name, call):
    """Put in with `from_config`, as the ecosystem does; neither has the shift of the noise, and both are told so."""
    ours = tiny_video.pipeline(tmp_path)
    theirs = their_pipeline(ours, "5b")
    ours.scheduler = tiny_video.SCHEDULERS[name].from_config(ours.scheduler.config)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    assert worst(film(ours, **CALLS[call]), film(theirs, **CALLS[call])) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_clip_in_half_precision(tmp_path, dtype):
    """Latents, embeddings and timesteps have the same dtypes: what differs is rounding in the networks."""
    ours, theirs = pair(tmp_path)
    full = film(ours)
    ours.to(dtype)
    theirs.to(dtype)
    call = {"output_type": "latent"}
    here, there = film(ours, **call), film(theirs, **call)
    assert tiny.difference(here, there) <= 8 * torch.finfo(dtype).eps
    assert np.abs(film(ours) - film(theirs)).mean() < 0.3 * np.abs(film(theirs) - full).mean() + 1e-4


# ---- negative controls


def swapped_guidance(pipe):
    whole = type(pipe).encode_prompt
    return pairs.changed(pipe, "encode_prompt", lambda *args: whole(pipe, *args)[::-1])


def divided_latents(pipe):
    whole = type(pipe).decode_latents
    return pairs.changed(pipe, "decode_latents", lambda latents, kind: whole(pipe, latents * 0.7, kind))


def other_first_noise(pipe):
    whole = type(pipe).prepare_latents
    return pairs.changed(pipe, "prepare_latents", lambda *args: whole(pipe, *args) * 1.05)


def positions_off_by_one(pipe):
    whole = cogvideox.rotary_embedding

    def shifted(*args, **kwargs):
        return tuple(one.roll(1, 0) for one in whole(*args, **kwargs))

    return pairs.changed(cogvideox, "rotary_embedding", shifted)


def shorter_prompt(pipe):
    whole = pipe.embed
    return pairs.changed(pipe, "embed", lambda texts, length: whole([text[:-1] for text in texts], length))


BREAKS = {
    "guidance the wrong way round": swapped_guidance,
    "latents scaled twice": divided_latents,
    "other first noise": other_first_noise,
    "positions off by one": positions_off_by_one,
    "a letter less": shorter_prompt,
}


@pytest.mark.parametrize(("name", "both"), thinned(BREAKS, SCHEDULERS), indirect=["both"], scope="module")
def test_comparison_sees_a_broken_pipeline(both, name):
    ours, theirs = both
    expected = film(theirs)
    with BREAKS[name](ours):
        assert worst(film(ours), expected) > TOLERANCE


def test_comparison_sees_another_shift_of_the_noise(tmp_path):
    ours, theirs = pair(tmp_path)
    ours.scheduler = tiny_video.scheduler(snr_shift_scale=3.0)
    assert worst(film(ours), film(theirs)) > TOLERANCE


def test_comparison_sees_padding_dropped_behind(tmp_path):
    ours, theirs = pair(tmp_path, "1.5")
    whole = type(ours).decode_latents
    with pairs.changed(ours, "decode_latents", lambda latents, kind: whole(ours, latents.roll(1, 1), kind)):
        assert worst(film(ours), film(theirs)) > TOLERANCE


# ---- checkpoints

LAYOUTS = [
    (torch.float32, None, None),
    (torch.float32, None, "40KB"),
    (torch.bfloat16, None, None),
    (torch.float16, "fp16", "20KB"),
]


def shards_of(folder):
    return [len(list((folder / name).glob("*.safetensors"))) for name in NETWORKS]


def same_weights(one, other, *, but=()):
    for name in NETWORKS:
        state, expected = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected if not key.endswith(but or "\0")), name


@pytest.mark.parametrize(("layout", "kind"), covering(LAYOUTS, KINDS))
def test_peer_saves_and_we_load(tmp_path, kind, layout):
    dtype, variant, shard_size = layout
    source = their_pipeline(tiny_video.pipeline(tmp_path / "words", kind), kind).to(dtype)
    source.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=shard_size or "5GB")
    assert (max(shards_of(tmp_path / "saved")) > 1) == (shard_size is not None)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", variant=variant, torch_dtype="auto")
    assert type(loaded) is CogVideoXPipeline
    assert loaded.dtype == dtype
    same_weights(loaded, source, but=("wo.weight",) if dtype == torch.float16 else ())
    assert_same_clip(tmp_path / "saved", variant)


@pytest.mark.parametrize(("layout", "kind"), covering(LAYOUTS, KINDS))
def test_we_save_and_peer_loads(tmp_path, kind, layout):
    dtype, variant, shard_size = layout
    source = tiny_video.pipeline(tmp_path / "words", kind).to(dtype)
    source.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=shard_size)
    assert (max(shards_of(tmp_path / "saved")) > 1) == (shard_size is not None)
    theirs = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "saved", variant=variant, dtype=dtype)
    same_weights(theirs, source, but=("wo.weight",) if dtype == torch.float16 else ())
    assert_same_clip(tmp_path / "saved", variant)


def test_a_checkpoint_as_published(tmp_path):
    """Its tokenizer is `spiece.model` alone."""
    folder = tiny_video.write_checkpoint(tmp_path / "model")
    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    assert_same_clip(folder, None)


def assert_same_clip(folder, variant):
    ours = CogVideoXPipeline.from_pretrained(folder, variant=variant)
    theirs = diffusers.CogVideoXPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    assert worst(film(ours), film(theirs)) <= TOLERANCE


def test_the_index_that_we_write_is_the_peers(tmp_path):
    ours = tiny_video.pipeline(tmp_path / "words")
    ours.save_pretrained(tmp_path / "ours")
    their_pipeline(ours, "5b").save_pretrained(tmp_path / "theirs")
    mine, other = (json.loads((tmp_path / who / "model_index.json").read_text()) for who in ("ours", "theirs"))
    other.pop("_name_or_path", None)
    assert mine == other


def test_parts_of_the_peer_can_be_passed_in(tmp_path):
    """A transformer, an autoencoder and a text encoder of others work in our pipeline as they are."""
    folder = tiny_video.write_checkpoint(tmp_path / "model")
    theirs = diffusers.CogVideoXPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    parts = {name: getattr(theirs, name) for name in NETWORKS}
    mixed = CogVideoXPipeline.from_pretrained(folder, **parts)
    mixed.set_progress_bar_config(disable=True)
    assert mixed.transformer is theirs.transformer
    assert worst(film(mixed), film(theirs)) <= TOLERANCE
