"""Configuration of the video autoencoder, as published in `vae/config.json`."""

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

RANGES: dict[str, Range] = {
    "layers_per_block": (1, MOST_LAYERS),
    "norm_eps": (SMALLEST, 1),
    "scaling_factor": (SMALLEST, LARGE),
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLCogVideoXConfig(Config):
    """Shape of an `AutoencoderKLCogVideoX`; `sample_height` and `sample_width` are in pixels."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int | float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    force_upcast: bool | float = True
    invert_scale_latents: bool = False

    # Entries that would change the network, with the values that we build.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
    }

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for a network that we do not build."""
        check_types(self, "Video VAE", RANGES)
        check_supported(self, "Video VAE")
        blocks = {"CogVideoXDownBlock3D": self.down_block_types, "CogVideoXUpBlock3D": self.up_block_types}
        check_blocks(self.block_out_channels, "Video VAE", blocks)
        ratio, most = self.temporal_compression_ratio, 2 ** (len(self.block_out_channels) - 1)
        if ratio not in [2**level for level in range(len(self.block_out_channels))]:
            raise ValueError(
                f"Video VAE config: temporal_compression_ratio={ratio!r} is not supported; it must be a power of two "
                f"from 1 to {most}."
            )

    @property
    def scale(self) -> int:
        """How many pixels wide and high a latent is: 8 in the published models."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """Levels that halve the number of frames: 2 in the published models."""
        return int(self.temporal_compression_ratio).bit_length() - 1
