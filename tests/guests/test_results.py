"""Pictures and clips in every form in which pipelines return them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lowtide.guests.results import results_of
from lowtide.media.video_file import rgb_frames

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
FLOATS = PIXELS.astype(np.float32) / 255
TENSOR = torch.from_numpy(FLOATS).movedim(-1, 1)
PIL = [Image.fromarray(pixels) for pixels in PIXELS]


@pytest.mark.parametrize(
    "images",
    [PIL, [PIL], tuple([each] for each in PIL), FLOATS, PIXELS, list(FLOATS), TENSOR, TENSOR[None], list(TENSOR)],
)
@pytest.mark.parametrize("wrap", [lambda images: SimpleNamespace(images=images), lambda images: images])
def test_pictures(images, wrap):
    results = results_of(wrap(images))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(results.pictures, PIXELS, strict=True))
    assert results.clips == ()


@pytest.mark.parametrize(
    "frames", [[PIL, PIL], PIL, np.stack([FLOATS, FLOATS]), TENSOR[None], [TENSOR], [list(FLOATS)], TENSOR.half()[None]]
)
def test_clips(frames):
    results = results_of(SimpleNamespace(frames=frames, audio=None))
    assert results.pictures == results.others == ()
    for clip in results.clips:
        assert np.abs(np.stack(list(rgb_frames(clip))).astype(int) - PIXELS).max() <= 1  # float16 has 11 bits
    assert len(results.clips) == (2 if len(frames) == 2 and frames is not PIL else 1)


def test_both_and_others():
    output = SimpleNamespace(images=PIL[:1], frames=[PIL], audio=torch.zeros(1, 9), depth=3, nsfw_content_detected=None)
    results = results_of(output)
    assert (len(results.pictures), len(results.clips), results.others) == (1, 1, ("depth",))
    assert [sound.shape for sound in results.sounds] == [(1, 9)]


def test_one_channel_becomes_three_and_a_picture_with_a_mask_keeps_it():
    (depth,) = results_of(SimpleNamespace(prediction=FLOATS[:1, ..., :1])).pictures
    assert np.array_equal(depth, np.repeat(PIXELS[0, ..., :1], 3, axis=-1))
    (layer,) = results_of([PIL[0].convert("RGBA")]).pictures
    assert layer.mode == "RGBA"


@pytest.mark.parametrize("output", [SimpleNamespace(images=torch.zeros(1, 16, 8, 6)), SimpleNamespace(images=["x"]), 3])
def test_what_is_no_picture(output):
    with pytest.raises(ValueError, match=r"shape|neither pictures nor frames"):
        results_of(output)


def test_sound_alone_is_no_picture():
    assert results_of(SimpleNamespace(images=None, audios=[1])).others == ("audios",)
    assert results_of(SimpleNamespace(audios=[1])).others == ("audios",)
    alone = results_of(SimpleNamespace(audios=np.zeros((2, 9), dtype=np.float32)))
    assert (alone.pictures, alone.clips, alone.others, len(alone.sounds)) == ((), (), (), 2)
