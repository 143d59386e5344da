"""The ways in which autoencoders of the peer can decode."""

import pytest
import torch

from lowtide.guests.guest_decode import GuestDecode, in_tiles_where_it_must
from lowtide.planning.workload import WHOLE

diffusers = pytest.importorskip("diffusers")
LEVELS = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}


def test_one_that_decodes_in_tiles_alone_stays_as_it_is():
    """It has not implemented the other way; a class of another name that is made from it has not either."""

    class Derived(diffusers.AutoencoderKLAllegro):
        pass

    for kind in (diffusers.AutoencoderKLAllegro, Derived):
        autoencoder = kind(**LEVELS)
        autoencoder.enable_tiling()
        assert GuestDecode.for_(autoencoder) is None
        assert autoencoder.use_tiling


def test_one_that_is_loaded_has_its_tiles_turned_on_where_it_decodes_in_these_alone():
    levels = {**LEVELS, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    in_tiles_alone, either = diffusers.AutoencoderKLAllegro(**LEVELS), diffusers.AutoencoderKL(**levels)
    for network, in_tiles in ((in_tiles_alone, True), (either, False)):
        assert in_tiles_where_it_must(network) is network
        assert network.use_tiling is in_tiles
    no_network = torch.nn.Linear(1, 1)
    assert in_tiles_where_it_must(no_network) is no_network


def test_to_ask_for_its_ways_calls_none_of_its_parts():
    autoencoder = diffusers.AutoencoderKL(**{**LEVELS, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4})  # fmt: skip
    called = []
    for part in autoencoder.modules():
        part.register_forward_pre_hook(lambda part, args: called.append(part))
    autoencoder.enable_tiling()
    ways = GuestDecode.for_(autoencoder)
    assert autoencoder.use_tiling
    assert not called
    assert ways is not None
    ways.set(WHOLE)
    autoencoder.decode(torch.zeros(1, 4, 4, 4))
    assert called
