"""Configuration of the image autoencoder, as published in `vae/config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowtide.config_checks import (
    LARGE,
    MOST_LAYERS,
    SMALLEST,
    Range,
    check_blocks,
    check_supported,
    check_types,
)
from lowtide.configs import Config

RANGES: dict[str, Range] = {"layers_per_block": (1, MOST_LAYERS), "scaling_factor": (SMALLEST, LARGE)}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    """Shape of an `AutoencoderKL`; where an older file has no `scaling_factor`, it is 0.18215 (SD 1.x)."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    # Entries that would change the network, with the values that we build.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for a network that we do not build."""
        check_types(self, "VAE", RANGES)
        check_supported(self, "VAE")
        blocks = {"DownEncoderBlock2D": self.down_block_types, "UpDecoderBlock2D": self.up_block_types}
        check_blocks(self.block_out_channels, "VAE", blocks)

    @property
    def scale(self) -> int:
        """How many pixels wide and high a latent is: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)
