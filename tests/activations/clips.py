"""Tiny video autoencoders, and the peer's with the same weights."""

from __future__ import annotations

from tests import tiny
from tests.parity import pairs

from lowtide.models.video_vae import AutoencoderKLCogVideoX

SMALL = {
    "block_out_channels": [8, 8, 12, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_height": 96,
    "sample_width": 80,
}


def levels(channels, ratio, **changes):
    count = len(channels)
    kinds = {
        "down_block_types": ["CogVideoXDownBlock3D"] * count,
        "up_block_types": ["CogVideoXUpBlock3D"] * count,
        "temporal_compression_ratio": ratio,
    }
    return {**SMALL, "block_out_channels": channels, **kinds, **changes}


CONFIGS = {
    "published levels": SMALL,
    "frames halved once": levels([8, 12, 16], 2, layers_per_block=2),
    "frames never halved": levels([8, 12], 1, latent_channels=6, norm_eps=1e-5),
}


def vae(kind="published levels", **changes):
    """Our autoencoder, ready to compute."""
    return tiny.set_weights(AutoencoderKLCogVideoX.from_config({**CONFIGS[kind], **changes}))


def vaes(kind="published levels", **changes):
    """Ours and the peer's."""
    import diffusers

    theirs = tiny.set_weights(diffusers.AutoencoderKLCogVideoX(**{**CONFIGS[kind], **changes}))
    return pairs.same_weights(vae(kind, **changes), theirs)


def latents(model, frames=5, size=(5, 7), batch=1):
    return 1.7 * tiny.numbers((batch, model.config.latent_channels, frames, *size), 3)


def clip(model, frames=17, size=(5, 7), batch=1):
    return tiny.numbers((batch, 3, frames, *(side * model.config.scale for side in size)), 5)
