"""Configurations from files: what we cannot build is refused by name, whatever the file holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from lowtide.config_checks import LARGEST
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.unet_config import UNet2DConditionConfig
from lowtide.models.vae import AutoencoderKL
from lowtide.models.vae_config import AutoencoderKLConfig

OTHER = {
    "act_fn": "gelu",
    "attention_type": "gated",
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "class_embeddings_concat": True,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_norm": "layer_norm",
    "downsample_padding": 0,
    "dropout": 0.1,
    "dual_cross_attention": True,
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_class_embeds": 1000,
    "only_cross_attention": True,
    "resnet_out_scale_factor": 2.0,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [[1], [2]],
    "time_cond_proj_dim": 256,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 64,
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
}


@pytest.mark.parametrize("key", UNet2DConditionConfig.SUPPORTED)
def test_an_entry_that_changes_the_network_is_refused_and_its_usual_values_are_not(key):
    with pytest.raises(ValueError, match=rf"U-Net config: {key}=.* is not supported; possible: "):
        UNet2DConditionConfig.from_dict({**tiny.UNETS["sd1"], key: OTHER[key]})
    for usual in UNet2DConditionConfig.SUPPORTED[key]:
        UNet2DConditionConfig.from_dict({**tiny.UNETS["sd1"], key: usual})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "block type 'AttnDownBlock2D' is not supported; possible: "),
        ({"up_block_types": ["UpBlock2D"] * 3}, "4 down blocks, 3 up blocks and 4 block_out_channels"),
        ({"norm_num_groups": 5}, "8 channels do not split into 5 groups"),
        ({"attention_head_dim": [2, 2]}, r"attention_head_dim=\[2, 2\] must be one number, or 4"),
        ({"transformer_layers_per_block": [1] * 5}, "transformer_layers_per_block"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'; possible: None, 'text_time'"),
        ({"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
        ({"block_out_channels": 5}, "block_out_channels=5 is not possible; it must be a list"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [8, "16", 16, 24]}, "block_out_channels"),
        ({"layers_per_block": [1, 2, 1, 1]}, "layers_per_block=.* it must be a whole number from 1"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"cross_attention_dim": None}, "cross_attention_dim=None"),
        ({"in_channels": LARGEST + 1}, f"a whole number from 1 to {LARGEST}"),
        ({"norm_eps": "small"}, "norm_eps='small' is not possible; it must be a number"),
        ({"use_linear_projection": 1}, "use_linear_projection=1 is not possible; it must be true or false"),
        ({"sample_size": [8, 8, 8]}, r"sample_size=\[8, 8, 8\] must be one side, or height and width"),
        ({"sample_size": "8"}, "sample_size='8'"),
    ],
)
def test_a_unet_that_cannot_be_built(entries, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_config({**tiny.UNETS["sd1"], **entries})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"act_fn": "relu"}, "VAE config: act_fn='relu' is not supported; possible: "),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_std": [1.0]}, "latents_std"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "'AttnDownEncoderBlock2D' is not supported; possible: "),
        ({"up_block_types": ["UpDecoderBlock2D"] * 4}, "4 blocks for 3 channel widths"),
        ({"scaling_factor": None}, "scaling_factor=None is not possible; it must be a number"),
        ({"latent_channels": -4}, "latent_channels=-4"),
        ({"use_quant_conv": "no"}, "use_quant_conv='no'"),
        ({"norm_num_groups": 5}, "divisible by num_groups"),
    ],
)
def test_an_autoencoder_that_cannot_be_built(entries, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_config({**tiny.VAE, **entries})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


def read_or_refused(cls, entries):
    """What is told; any other exception than a `ValueError` fails the test."""
    try:
        cls.from_dict(entries)
    except ValueError as error:
        return str(error)
    return {UNet2DConditionConfig: "U-Net config: ", AutoencoderKLConfig: "VAE config: "}[cls] + "read"


@settings(max_examples=150)
@given(key=st.sampled_from(sorted(UNet2DConditionConfig.__dataclass_fields__)), value=ANYTHING)
def test_a_unet_config_is_read_or_refused_whatever_it_holds(key, value):
    assert read_or_refused(UNet2DConditionConfig, {**tiny.UNETS["sd1"], key: value}).startswith("U-Net config: ")


@settings(max_examples=150)
@given(key=st.sampled_from(sorted(AutoencoderKLConfig.__dataclass_fields__)), value=ANYTHING)
def test_an_autoencoder_config_is_read_or_refused_whatever_it_holds(key, value):
    assert read_or_refused(AutoencoderKLConfig, {**tiny.VAE, key: value}).startswith("VAE config: ")


def test_old_files_without_a_scaling_factor_mean_that_of_stable_diffusion():
    entries = {key: value for key, value in tiny.VAE.items() if key != "scaling_factor"}
    assert AutoencoderKLConfig.from_dict(entries).scaling_factor == 0.18215


@pytest.mark.parametrize(("kind", "scale"), [("sd1", 4), ("four levels", 8)])
def test_pixels_of_a_latent(kind, scale):
    assert AutoencoderKLConfig.from_dict(tiny.VAES[kind]).scale == scale


def test_heads_and_layers_of_each_level():
    config = UNet2DConditionConfig.from_dict(tiny.UNETS["sdxl"])
    assert [config.heads(level) for level in range(3)] == [2, 4, 6]
    assert [config.layers(level) for level in range(3)] == [1, 2, 3]
    assert UNet2DConditionConfig.from_dict(tiny.UNETS["sd1"]).heads(3) == 2
    named = UNet2DConditionConfig.from_dict({**tiny.UNETS["sd1"], "num_attention_heads": 4})
    assert named.heads(0) == 4


def test_a_config_survives_the_round_trip_with_entries_that_we_do_not_know():
    entries = {**tiny.UNETS["sd2"], "dropout": 0.0, "some_future_entry": [1, {"a": 2}]}
    config = UNet2DConditionConfig.from_dict({**entries, "_class_name": "UNet2DConditionModel"})
    written = config.to_dict()
    assert {key: written[key] for key in entries} == entries
    assert UNet2DConditionConfig.from_dict(written) == config
    assert config["block_out_channels"] == [8, 16, 16, 24]
    assert config.get("some_future_entry") == [1, {"a": 2}]
    assert "_class_name" not in written
