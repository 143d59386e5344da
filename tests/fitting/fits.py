"""Budgets for tiny pipelines: rates of a machine whose process takes nothing by itself, so that kilobytes count."""

import pytest
import torch
from tests import tiny, tiny_video
from tests.fitting.traced_once import traced_once  # noqa: F401

from lowtide.pipelines.cogvideox import CogVideoXPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.planning.rates import Rates

RATES = Rates(
    device="cpu",
    convolution=5e10,
    product=1e11,
    attention=5e10,
    touched=1e10,
    kernel=1e-5,
    link=5e9,
    converted=3e9,
    disk=1e9,
    cache=2**33,
    base=0,
)
UNET = {
    "block_out_channels": [8, 24],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
"""A U-Net of few modules: planning, loading and streaming take as long as there are many."""


@pytest.fixture
def bare_machine(monkeypatch):
    """Plans count the pipeline alone."""
    monkeypatch.setattr("lowtide.fitting.prepare._rates", lambda *_: RATES)


def small(folder, **models):
    """The pipeline of tiny parts with that U-Net; `folder` keeps the vocabulary."""
    return tiny.pipeline(folder, **{"unet": tiny.unet(**UNET), **models})


def checkpoint(folder, kind, **options):
    """A tiny checkpoint of pictures or of clips."""
    if kind == "pictures":
        small(folder / "words", **options).save_pretrained(folder / "model")
        return folder / "model"
    return tiny_video.write_checkpoint(folder / "model")


def load(folder, kind, **options):
    """The pipeline in `folder`, silent."""
    cls = StableDiffusionPipeline if kind == "pictures" else CogVideoXPipeline
    pipe = cls.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, **call):
    """Two pictures or one clip, as tensors."""
    if isinstance(pipe, StableDiffusionPipeline):
        usual = {"num_images_per_prompt": 2, "generator": tiny.seeded(3, 4), "output_type": "pt"}
        return pipe("a boat", **{"num_inference_steps": 3, **usual, **call}).images
    usual = {"generator": tiny.seeded(3), "output_type": "pt", "max_sequence_length": tiny_video.MAX_TOKENS}
    return pipe("a red panda", **{"num_inference_steps": 3, **usual, **call}).frames


def least(pipe, **size):
    """The least bytes of RAM that a fitted pipeline's runs of a size take."""
    from lowtide.planning.planner import minimum

    fit = pipe.applied.fit
    return minimum(fit.meta.workload(pipe.usual_size(**size), fit.allow), fit.rates, fit.allow).ram


def same(ours, theirs):
    """Whether results are the same up to the rounding of a decode by rows."""
    return torch.allclose(ours, theirs, rtol=0, atol=1e-5)
