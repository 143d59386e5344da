"""Numbers of numpy, and others that count, are taken wherever Python's own are."""

import json

import numpy as np
import pytest
import torch
from tests import tiny, tiny_video

from lowtide.activations.frame_cache import frame_batches
from lowtide.activations.tiling import Tiles
from lowtide.memory.rule import Rule
from lowtide.pipelines.number_checks import check_count, check_guidance, check_steps
from lowtide.schedulers import SCHEDULERS
from lowtide.sizes import parse_bytes
from lowtide.whole_numbers import whole

KINDS = [np.int64, np.int32, np.uint8, torch.tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures(tmp_path, kind):
    pipe = tiny.pipeline(tmp_path)
    plain = pipe("a", 16, 24, num_inference_steps=2, generator=tiny.seeded(1), output_type="pt", eta=0.5).images
    sides = (kind(16), kind(24))
    options = {"num_inference_steps": kind(2), "guidance_scale": np.float32(7.5), "num_images_per_prompt": kind(1)}
    given = pipe("a", *sides, **options, eta=np.float32(0.5), generator=tiny.seeded(1), output_type="pt").images
    assert plain.equal(given)
    size = pipe.usual_size(height=kind(16), width=kind(24), pictures=kind(3), steps=kind(5))
    assert json.loads(json.dumps(size.to_dict()))["pictures"] == 3


def test_clips(tmp_path):
    pipe = tiny_video.pipeline(tmp_path)

    def frames(kind, real):
        return pipe(
            "a", height=kind(32), width=kind(48), num_frames=kind(9), num_inference_steps=kind(1),
            guidance_scale=real(6), num_videos_per_prompt=kind(1), max_sequence_length=kind(10),
            generator=tiny.seeded(1), output_type="latent",
        ).frames  # fmt: skip

    assert frames(int, float).equal(frames(np.int64, np.float64))


def test_a_plan_for_numpy_sizes_can_be_saved(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    plan = pipe.fit(ram=np.int64(8 * 10**9), height=np.int64(32), width=np.int32(32), steps=np.int64(2))
    assert json.loads(plan.to_json())
    pipe.unfit()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    ours, others = (tiny.scheduler(name) for _ in range(2))
    ours.set_timesteps(5)
    others.set_timesteps(np.int64(5))
    assert ours.timesteps.equal(others.timesteps)
    for steps in (2.5, True, "5", None):
        with pytest.raises(ValueError, match="is not possible: choose from"):
            others.set_timesteps(steps)


def test_other_counts():
    assert Tiles(np.int64(64), np.int32(32), np.float32(0.25), 0).in_latents(8)[0] == (8, 4)
    assert len(list(frame_batches(5, np.int64(2)))) == 2
    assert parse_bytes(np.int64(5)) == 5
    assert json.dumps(Rule(prefetch=np.int64(2), resident_bytes=np.uint64(7)).to_dict())


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", None, [2], np.array([1, 2]), np.nan])
def test_what_is_no_whole_number(value):
    assert whole(value) is None
    for check in (check_steps, lambda count: check_count("count", count)):
        with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
            check(value)
    with pytest.raises(ValueError, match=r"resident_bytes=.* is not possible"):
        Rule(resident_bytes="x" if value is None else value)


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), "7", None, True])
def test_guidance_is_finite(value):
    with pytest.raises(ValueError, match="it must be a finite number"):
        check_guidance(value)
