"""Which ways of decoding an autoencoder of the peer's has."""

import pytest

from lowtide.guests.guest_decode import GuestDecode

diffusers = pytest.importorskip("diffusers")


def test_one_that_decodes_in_tiles_alone_is_left_as_it_is():
    levels = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    assert GuestDecode.for_(diffusers.AutoencoderKLAllegro(**levels)) is None
    plain = {"block_out_channels": [8], "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"]}  # fmt: skip
    assert GuestDecode.for_(diffusers.AutoencoderKL(**plain)) is not None
