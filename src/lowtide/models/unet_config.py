"""Configuration of the conditional U-Net, as published in `unet/config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowtide.config_checks import LARGE, MOST_LAYERS, MOST_SIDE, SMALLEST, Range, check_supported, check_types
from lowtide.configs import Config

CROSS_ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN_BLOCKS = ("DownBlock2D", "UpBlock2D")

RANGES: dict[str, Range] = {
    "sample_size": (1, MOST_SIDE),
    "layers_per_block": (1, MOST_LAYERS),
    "transformer_layers_per_block": (1, MOST_LAYERS),
    "norm_eps": (SMALLEST, 1),
    "freq_shift": (-1, LARGE),
}


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Config):
    """Shape of a `UNet2DConditionModel`.

    As in the published files, `attention_head_dim` is the number of heads (one for each block, or one for all), unless
    `num_attention_heads` gives that number. `sample_size` is the side of the latents the model was trained on,
    or their height and width.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    # Entries that would change the network, with the values that we build.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dropout": (0, 0.0),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for a network that we do not build."""
        check_types(self, "U-Net", RANGES)
        check_supported(self, "U-Net")
        possible = (*CROSS_ATTENTION_BLOCKS, *PLAIN_BLOCKS)
        for kind in (*self.down_block_types, *self.up_block_types):
            if kind not in possible:
                raise ValueError(f"U-Net config: block type {kind[:80]!r} is not supported; possible: {possible}.")
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(
                f"U-Net config: sample_size={list(self.sample_size)} must be one side, or height and width."
            )
        if self.addition_embed_type not in (None, "text_time"):
            kinds = "None, 'text_time'"
            raise ValueError(f"U-Net config: addition_embed_type={self.addition_embed_type!r}; possible: {kinds}.")
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ValueError(
                f"U-Net config: {len(self.down_block_types)} down blocks, {len(self.up_block_types)} up blocks and "
                f"{levels} block_out_channels; the three numbers must be equal."
            )
        for key in ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"U-Net config: {key}={list(value)} must be one number, or {levels}, one for each block."
                )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"U-Net config: {channels} channels do not split into {self.norm_num_groups} groups.")

    def heads(self, level: int) -> int:
        """Attention heads at `level` (0 = finest)."""
        return _at(self.num_attention_heads or self.attention_head_dim, level)

    def layers(self, level: int) -> int:
        """Transformer blocks in each attention module at `level`."""
        return _at(self.transformer_layers_per_block, level)


def _at(value: int | tuple[int, ...], level: int) -> int:
    return value[level] if isinstance(value, tuple) else value
