"""The video autoencoder against the peer's, in fp32: layers, clips of every length, tiles; also with ours broken."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.activations import clips
from tests.parity import pairs
from tests.thinned import covering, thinned

from lowtide.activations import frame_cache
from lowtide.activations.frame_cache import FrameCache, only_batch
from lowtide.models import video_vae_layers
from lowtide.models.video_vae import AutoencoderKLCogVideoX

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
vaes = cache(clips.vaes)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def decoded_difference(pair, z):
    ours, theirs = pair
    return tiny.difference(ours.decode(z).sample, theirs.decode(z).sample)


def encoded_difference(pair, x):
    ours, theirs = (model.encode(x).latent_dist for model in pair)
    return max(tiny.difference(ours.mean, theirs.mean), tiny.difference(ours.logvar, theirs.logvar))


@pytest.mark.parametrize(("frames", "kind"), thinned([1, 2, 3, 4, 5, 8, 13], clips.CONFIGS))
def test_decode(kind, frames):
    pair = vaes(kind)
    assert decoded_difference(pair, clips.latents(pair[0], frames, (3, 5), batch=2)) <= TOLERANCE


@pytest.mark.parametrize(("frames", "kind"), thinned([1, 2, 7, 8, 9, 10, 17, 20, 49], clips.CONFIGS))
def test_encode(kind, frames):
    pair = vaes(kind)
    assert encoded_difference(pair, clips.clip(pair[0], frames, (3, 5), batch=2)) <= TOLERANCE


@pytest.mark.parametrize("size", [3, 4, 100])
def test_other_batches_of_frames(size):
    """The statistics of the norms are those of a batch: another size is another clip, and the peer's."""
    ours, theirs = clips.vaes()
    z, x = clips.latents(ours, 9, (2, 3)), clips.clip(ours, 33, (2, 3))
    published = ours.decode(z).sample
    for model in (ours, theirs):
        model.num_latent_frames_batch_size = size
        model.num_sample_frames_batch_size = 4 * size
    assert decoded_difference((ours, theirs), z) <= TOLERANCE
    assert encoded_difference((ours, theirs), x) <= TOLERANCE
    other = ours.decode(z).sample
    assert other.shape != published.shape or tiny.difference(other, published) > 1e-2


@pytest.mark.parametrize(
    ("size", "slicing"),
    [
        *covering([(5, 7), (6, 5), (12, 5), (11, 14)], [True, False]),
        *(pytest.param((17, 23), slicing, marks=pytest.mark.slow) for slicing in (True, False)),
    ],
)
def test_tiles(size, slicing):
    pair = clips.vaes()
    for model in pair:
        model.enable_tiling()
        if slicing:
            model.enable_slicing()
    z, x = clips.latents(pair[0], 3, size, batch=2), clips.clip(pair[0], 9, size, batch=2)
    assert decoded_difference(pair, z) <= TOLERANCE
    assert encoded_difference(pair, x) <= TOLERANCE


@pytest.mark.slow
def test_published_widths():
    """The first levels of the published model, one block each."""
    pair = clips.vaes(block_out_channels=[128, 256, 256, 512], norm_num_groups=32, latent_channels=16)
    assert decoded_difference(pair, clips.latents(pair[0], 3, (3, 4))) <= TOLERANCE
    assert encoded_difference(pair, clips.clip(pair[0], 5, (2, 3))) <= TOLERANCE


# ---- layers


def layer(model, name):
    return model.get_submodule(name)


LAYERS = {
    "decoder.conv_in": False,
    "decoder.norm_out": True,
    "decoder.mid_block.resnets.0": True,
    "decoder.up_blocks.2.resnets.0": True,
    "encoder.down_blocks.2.resnets.0": False,
    "encoder.norm_out": False,
}


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_after_another_batch_of_frames(name, frames):
    ours, theirs = (layer(model, name) for model in vaes())
    channels = next(part for part in ours.modules() if not list(part.children())).weight.shape
    width = channels[1] if name == "decoder.conv_in" else channels[0]
    memory, cache_of_theirs = FrameCache(), None
    for place in range(2):
        memory.begin(is_last=place == 1)
        x = tiny.numbers((2, width, frames, 6, 8), place)
        z = [tiny.numbers((2, 4, -(-frames // 2), 3, 4), 7 + place)] if LAYERS[name] else []
        if isinstance(ours, torch.nn.GroupNorm):
            assert tiny.difference(ours(x), theirs(x)) <= TOLERANCE
            continue
        if "resnets" in name:
            got = ours(x, z[0] if z else None, memory)
            expected, cache_of_theirs = theirs(x, None, *(z or [None]), conv_cache=cache_of_theirs)
        else:
            got = ours(x, *z, memory)
            expected, cache_of_theirs = theirs(x, *z, conv_cache=cache_of_theirs)
        assert tiny.difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("name", ["encoder.down_blocks.0", "encoder.down_blocks.2"])
def test_downsampling(name, frames):
    ours, theirs = (layer(model, name).downsamplers[0] for model in vaes())
    x = tiny.numbers((2, ours.conv.in_channels, frames, 6, 10))
    assert tiny.difference(ours(x), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("name", ["decoder.up_blocks.0", "decoder.up_blocks.2"])
def test_upsampling(name, frames):
    ours, theirs = (layer(model, name).upsamplers[0] for model in vaes())
    x = tiny.numbers((2, ours.conv.in_channels, frames, 3, 5))
    assert tiny.difference(ours(x), theirs(x)) <= TOLERANCE


# ---- negative controls


def forgetful():
    """Every batch of frames begins as the first one does."""
    whole = FrameCache.joined

    def joined(self, x, frames):
        self.has_before = False
        return whole(self, x, frames)

    return pairs.changed(FrameCache, "joined", joined)


def rest_at_the_end():
    """The frames that are left over make a batch of their own at the end."""
    batches = lambda frames, size: (slice(at, min(at + size, frames)) for at in range(0, frames, size))  # noqa: E731
    return pairs.changed(frame_cache, "frame_batches", batches)


def first_frame_like_the_others():
    whole = F.interpolate
    enlarged = lambda z, size: whole(z, size=tuple(size))  # noqa: E731
    return pairs.changed(video_vae_layers, "_enlarged", enlarged)


BREAKS = {
    "nothing remembered": lambda model: forgetful(),
    "the rest at the end": lambda model: rest_at_the_end(),
    "the first frame like the others": lambda model: first_frame_like_the_others(),
    "norms' epsilon": lambda model: pairs.other_eps(model, torch.nn.GroupNorm, 1e-4),
    "a bias off by a hundredth": lambda model: pairs.changed(
        model.decoder.norm_out.conv_b.conv, "bias", torch.nn.Parameter(model.decoder.norm_out.conv_b.conv.bias * 1.01)
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_comparison_sees_a_broken_decoder(name):
    ours, theirs = vaes()
    z = clips.latents(ours, 5)
    expected = theirs.decode(z).sample
    with BREAKS[name](ours):
        assert tiny.difference(ours.decode(z).sample, expected) > TOLERANCE


# ---- files, other dtypes


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_crossing_both_ways(tmp_path, shard):
    ours, theirs = vaes()
    z = clips.latents(ours, 3)
    expected = ours.decode(z).sample
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard or "5GB")
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    loaded = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "theirs")
    assert torch.equal(loaded.decode(z).sample, expected)
    read = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours")
    assert tiny.difference(read.decode(z).sample, expected) <= TOLERANCE
    assert loaded.config == ours.config


def test_half_precision_is_as_near_to_the_truth_as_the_peers():
    ours, theirs = clips.vaes()
    z = clips.latents(ours, 5)
    truth = ours.decode(z).sample
    errors = [
        float((model.to(torch.bfloat16).decode(z.bfloat16()).sample.float() - truth).square().mean().sqrt())
        for model in (ours, theirs)
    ]
    assert errors[0] <= 1.2 * errors[1]


def test_a_part_alone_takes_a_clip_as_one_batch():
    ours, theirs = vaes()
    z = clips.latents(ours, 3)
    assert tiny.difference(ours.decoder(z), theirs.decoder(z)[0]) <= TOLERANCE
    assert torch.equal(ours.decoder(z), ours.decoder(z, only_batch()))
