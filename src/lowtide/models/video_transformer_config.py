"""Configuration of the video transformer, as published in `transformer/config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowtide.config_checks import LARGE, MOST_LAYERS, MOST_SIDE, SMALLEST, Range, check_supported, check_types
from lowtide.configs import Config

RANGES: dict[str, Range] = {
    "freq_shift": (-1, LARGE),
    "num_layers": (1, MOST_LAYERS),
    "sample_width": (1, MOST_SIDE),
    "sample_height": (1, MOST_SIDE),
    "sample_frames": (1, MOST_SIDE),
    "norm_eps": (SMALLEST, 1),
    "spatial_interpolation_scale": (SMALLEST, LARGE),
    "temporal_interpolation_scale": (SMALLEST, LARGE),
}


@dataclass(frozen=True, kw_only=True)
class CogVideoXTransformer3DConfig(Config):
    """Shape of a `CogVideoXTransformer3DModel`.

    `sample_height` and `sample_width` are those of the latents the model was trained on, `sample_frames` the frames of
    the video they stand for. `patch_size_t` latent frames make one token (version 1.5); None: each makes its own.
    Models that start from a picture have `use_learned_positional_embeddings` and `ofs_embed_dim`.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    # Entries that would change the network, with the values that we build.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "activation_fn": ("gelu-approximate",),
        "dropout": (0, 0.0),
        "norm_elementwise_affine": (True,),
        "timestep_activation_fn": ("silu",),
    }

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for a network that we do not build."""
        check_types(self, "Video transformer", RANGES)
        check_supported(self, "Video transformer")
        if self.use_learned_positional_embeddings and not self.use_rotary_positional_embeddings:
            _refuse("use_learned_positional_embeddings without use_rotary_positional_embeddings is not supported.")
        if self.patch_size_t is not None and not self.use_rotary_positional_embeddings:
            _refuse("patch_size_t without use_rotary_positional_embeddings is not supported.")
        if self.patch_size_t is not None and self.use_learned_positional_embeddings:
            _refuse("patch_size_t with use_learned_positional_embeddings is not supported.")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            _refuse(f"ofs_embed_dim={self.ofs_embed_dim} must be null, or time_embed_dim={self.time_embed_dim}.")
        size = "attention_head_dim" if self.use_rotary_positional_embeddings else "num_attention_heads * head size"
        width = self.attention_head_dim if self.use_rotary_positional_embeddings else self.inner_dim
        if width % 16:
            _refuse(f"{size}={width} must be a multiple of 16: positions are split over it.")
        for key in ("sample_height", "sample_width"):
            if getattr(self, key) < self.patch_size:
                _refuse(f"{key}={getattr(self, key)} is smaller than patch_size={self.patch_size}.")

    @property
    def inner_dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def sample_latent_frames(self) -> int:
        """Latent frames of a video of `sample_frames`."""
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1


def _refuse(reason: str) -> None:
    raise ValueError(f"Video transformer config: {reason}")
