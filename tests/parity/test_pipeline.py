"""Whole pictures against the peer's: every scheduler, every way to call; each comparison also with ours broken."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from tests import tiny
from tests.parity import pairs
from tests.schedulers.trajectories import FLOW
from tests.thinned import thinned

from lowtide.activations.traced_call import NotByRowsError

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
]

# The bar is 1/255, one grey level. Measured: not a bit of difference in any case here (torch 2.13, x86).
TOLERANCE = 1 / 255 / 16
PROMPTS = ["a red boat on the sea", "night"]


@functools.cache
def networks(kind):
    """Our U-Net and autoencoder, and the peer's: made once, for they are only called."""
    heads = tiny.UNETS[kind]["attention_head_dim"]
    of_levels = {"attention_head_dim": heads if isinstance(heads, int) else heads[:2]}
    return *pairs.unets(kind, **tiny.FEW_BLOCKS, **of_levels), *pairs.vaes()


def pair(folder, name="DDIMScheduler", kind="sd1", made=networks, **schedule):
    """Our pipeline and the peer's with the same weights and vocabulary."""
    our_unet, their_unet, our_vae, their_vae = made(kind)
    ours = tiny.pipeline(folder, unet=our_unet, vae=our_vae, schedule=tiny.scheduler(name, **schedule))
    theirs = diffusers.StableDiffusionPipeline(
        vae=their_vae,
        text_encoder=pairs.of_transformers(ours.text_encoder),
        tokenizer=pairs.of_transformers(ours.tokenizer),
        unet=their_unet,
        scheduler=getattr(diffusers, name).from_config(ours.scheduler.config.to_dict()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    return pair(tmp_path_factory.mktemp("both"), request.param)


@pytest.fixture(scope="module")
def ddim(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("ddim"))


def picture(pipe, **call):
    """A picture of 16x16 pixels in three steps, unless `call` says otherwise; generators are made from seeds."""
    seeds = call.pop("seeds", (3,))
    defaults = {"prompt": PROMPTS[0], "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "np"}
    images = pipe(**{**defaults, "generator": tiny.seeded(*seeds), **call}).images
    return images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


plain = functools.cache(picture)
"""The peer's usual picture, made once."""


def worst(ours, theirs):
    """The largest difference of any channel of any pixel, on a scale from 0 to 1."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05, "a flat picture proves nothing"
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


EMBEDS = {"prompt": None, "prompt_embeds": tiny.numbers((2, 16, 24), 7)}
CALLS = {
    "guidance": {},
    "no guidance": {"guidance_scale": 1.0},
    "weak guidance": {"guidance_scale": 1.5, "negative_prompt": "sea"},
    "several prompts": {"prompt": PROMPTS, "negative_prompt": ["fog", ""]},
    "several pictures of each": {"prompt": PROMPTS, "num_images_per_prompt": 2, "negative_prompt": ["fog", "x"]},
    "a generator for each": {"prompt": PROMPTS, "num_images_per_prompt": 2, "seeds": (5, 6, 7, 8)},
    "another size": {"height": 24, "width": 40},
    "latents given": {"latents": tiny.numbers((1, 4, 4, 4), 4) * 1.7, "generator": None},
    "embeddings given": {**EMBEDS, "negative_prompt_embeds": tiny.numbers((2, 16, 24), 8)},
    "embeddings given, text to avoid": {**EMBEDS, "negative_prompt": ["fog", "x"], "num_images_per_prompt": 2},
    "embeddings given, no guidance": {**EMBEDS, "guidance_scale": 0.0},
    "noise in each step": {"eta": 0.7},
    "noise in each step, a generator for each": {"prompt": PROMPTS, "eta": 1.0, "seeds": (5, 6)},
    "one step": {"num_inference_steps": 1},
    "five steps": {"num_inference_steps": 5},
}


# How a call prepares its work is no matter of the scheduler; these differ from one to the next.
FOR_EVERY_SCHEDULER = ("guidance", "no guidance", "a generator for each", "latents given", "one step", "five steps")


@pytest.mark.parametrize(
    ("both", "name"), thinned(tiny.SCHEDULERS, FOR_EVERY_SCHEDULER, most=2), indirect=["both"], scope="module"
)
def test_same_picture_with_every_scheduler(both, name):
    ours, theirs = both
    assert worst(picture(ours, **CALLS[name]), picture(theirs, **CALLS[name])) <= TOLERANCE


@pytest.mark.parametrize("name", CALLS)
def test_same_picture(ddim, name):
    ours, theirs = ddim
    assert worst(picture(ours, **CALLS[name]), picture(theirs, **CALLS[name])) <= TOLERANCE


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_same_output_of_each_type(ddim, output_type):
    ours, theirs = (picture(pipe, output_type=output_type) for pipe in ddim)
    scale = 255 if output_type == "pil" else 1
    assert ours.dtype == theirs.dtype
    assert worst(ours / scale, theirs / scale) <= TOLERANCE


V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
OPTIONS = {
    "SD 2, v-prediction": ("DDIMScheduler", "sd2", {**V, "rescale_betas_zero_snr": True}),
    "SD 2, Euler": ("EulerDiscreteScheduler", "sd2", V),
    "SD 2, PNDM": ("PNDMScheduler", "sd2", {"prediction_type": "v_prediction"}),
    "Karras": ("DPMSolverMultistepScheduler", "sd1", {"use_karras_sigmas": True}),
    "an SDE": ("DPMSolverMultistepScheduler", "sd1", {"algorithm_type": "sde-dpmsolver++"}),
    "a flow": ("UniPCMultistepScheduler", "sd1", {**FLOW, "flow_shift": 3.0}),
    "Runge-Kutta": ("PNDMScheduler", "sd1", {"skip_prk_steps": False}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_picture_with_options(tmp_path, name):
    scheduler, kind, entries = OPTIONS[name]
    ours, theirs = pair(tmp_path, scheduler, kind, **entries)
    assert worst(*(picture(pipe, num_inference_steps=5) for pipe in (ours, theirs))) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # the peer's own
@pytest.mark.parametrize("outdated", [{"clip_sample": True}, {"steps_offset": 0}])
def test_same_picture_from_an_outdated_scheduler_file(tmp_path, outdated):
    """Both pipelines correct these entries; and without that, the picture would be another."""
    with pytest.warns(UserWarning, match=f"outdated.*{next(iter(outdated))}"):
        ours = tiny.pipeline(tmp_path, schedule=tiny.scheduler(**outdated))
    _, theirs = pair(tmp_path)
    theirs = type(theirs)(
        **{**theirs.components, "scheduler": diffusers.DDIMScheduler(**{**tiny.SCHEDULE, **outdated})},
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    assert ours.scheduler.config.to_dict() == tiny.scheduler().config.to_dict()
    expected = picture(theirs)
    assert worst(picture(ours), expected) <= TOLERANCE
    ours.scheduler = tiny.scheduler(**outdated)  # negative control
    assert worst(picture(ours), expected) > TOLERANCE


def swapped_guidance(pipe):
    whole = type(pipe).encode_prompt
    return pairs.changed(pipe, "encode_prompt", lambda *args: torch.cat(whole(pipe, *args).chunk(2)[::-1]))


def unscaled_latents(pipe):
    whole = type(pipe).decode_latents
    return pairs.changed(pipe, "decode_latents", lambda latents: whole(pipe, latents * pipe.vae.config.scaling_factor))


def other_first_noise(pipe):
    whole = type(pipe).prepare_latents
    return pairs.changed(pipe, "prepare_latents", lambda *args: whole(pipe, *args) * 1.05)


def other_offset(pipe):
    config = {**pipe.scheduler.config.to_dict(), "steps_offset": 0, "timestep_spacing": "leading"}
    return pairs.changed(pipe, "scheduler", type(pipe.scheduler).from_config(config))


def truncated_prompt(pipe):
    whole = pipe.embed
    return pairs.changed(pipe, "embed", lambda texts: whole([text[:-1] for text in texts]))


BREAKS = {
    "guidance the wrong way round": swapped_guidance,
    "latents not divided by the scaling factor": unscaled_latents,
    "other first noise": other_first_noise,
    "a letter less": truncated_prompt,
    "sine and cosine swapped": lambda _: pairs.swapped_halves(),
    "another scale of attention": lambda _: pairs.unscaled_attention(),
}


@pytest.mark.parametrize(("both", "name"), thinned(tiny.SCHEDULERS, BREAKS, most=3), indirect=["both"], scope="module")
def test_comparison_sees_a_broken_pipeline(both, name):
    """Negative control."""
    ours, theirs = both
    expected = plain(theirs)
    with BREAKS[name](ours):
        assert worst(picture(ours), expected) > TOLERANCE


def test_comparison_sees_other_timesteps(ddim):
    """Negative control: timesteps off by one, of a thousand."""
    ours, theirs = ddim
    expected = picture(theirs)
    with other_offset(ours):
        assert worst(picture(ours), expected) > TOLERANCE


def test_comparison_sees_generators_in_another_order(ddim):
    """Negative control: pictures and generators are paired prompt by prompt."""
    ours, theirs = ddim
    call = {"prompt": PROMPTS, "num_images_per_prompt": 2}
    expected = picture(theirs, **call, seeds=(5, 6, 7, 8))
    assert worst(picture(ours, **call, seeds=(5, 7, 6, 8)), expected) > TOLERANCE


def test_a_picture_without_seams(tmp_path):
    """Scripts set `padding_mode` on every convolution; exact decoding by rows says that it cannot."""
    ours, theirs = pair(tmp_path, made=networks.__wrapped__)
    plain = picture(ours)
    for pipe in (ours, theirs):
        for network in (pipe.unet, pipe.vae):
            for module in network.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.padding_mode = "circular"
    seamless = picture(theirs)
    assert np.abs(picture(ours) - seamless).max() <= TOLERANCE
    assert np.abs(plain - seamless).max() > TOLERANCE
    ours.enable_sequential_cpu_offload(device="cpu")
    assert np.abs(picture(ours) - seamless).max() <= TOLERANCE
    ours.enable_vae_tiling("exact")
    with pytest.raises(NotByRowsError, match="circular"):
        picture(ours)
