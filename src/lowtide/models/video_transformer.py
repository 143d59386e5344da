"""The denoiser of CogVideoX: a transformer over the tokens of text and video together (Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowtide.models.layers import Linear, TimestepEmbedding, timestep_embedding
from lowtide.models.mixin import ModelMixin
from lowtide.models.model_outputs import Transformer3DModelOutput
from lowtide.models.video_layers import GROUP, AdaLayerNorm, PatchEmbed, VideoBlock, VideoFeedForward
from lowtide.models.video_positions import token_grid
from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig
from lowtide.whole_numbers import whole


class CogVideoXTransformer3DModel(ModelMixin):
    """Predict noise (or velocity) from noisy latents of a video, the time, and the text.

    Shapes: latents `[B, F, in_channels, H, W]`, time a number, `[]`, `[1]` or `[B]`, text `[B, S, text_embed_dim]`.
    """

    config_class = CogVideoXTransformer3DConfig
    never_cast = ("patch_embed", "norm")
    config: CogVideoXTransformer3DConfig

    def __init__(self, config: CogVideoXTransformer3DConfig) -> None:
        super().__init__(config)
        width, time, eps = config.inner_dim, config.time_embed_dim, config.norm_eps
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimestepEmbedding(width, time)
        self.ofs_embedding = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(VideoBlock(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(width, eps)
        self.norm_out = AdaLayerNorm(time, width, eps)
        self.proj_out = Linear(width, config.out_channels * (config.patch_size_t or 1) * config.patch_size**2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | float | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer3DModelOutput | tuple[torch.Tensor]:
        """Denoise once.

        `image_rotary_emb` is that of `lowtide.models.video_positions.rotary_embedding`, for models that have
        `use_rotary_positional_embeddings`. `ofs` is the second time of models with `ofs_embed_dim`. `timestep_cond`
        and `attention_kwargs` must be None: these models do not use them.
        Returns an output with `.sample` `[B, F, out_channels, H, W]`, or a tuple of it where `return_dict` is false.
        Raises `ValueError` for latents that do not split into patches, and for arguments that do not fit the model.
        """
        self._check(hidden_states, timestep_cond, ofs, image_rotary_emb, attention_kwargs)
        time_BT = self.embed_time(hidden_states, timestep, ofs)
        text = encoder_hidden_states.shape[1]
        x_BLC = self.patch_embed(encoder_hidden_states, hidden_states)
        for block in self.transformer_blocks:
            x_BLC = block(x_BLC, time_BT, text, image_rotary_emb)
        x_BLC = self.proj_out(self.norm_out(self.norm_final(x_BLC[:, text:]), time_BT))
        sample = self._latents(x_BLC, hidden_states.shape)
        return Transformer3DModelOutput(sample=sample) if return_dict else (sample,)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 1) -> None:
        """Compute the feed-forwards for `chunk_size` tokens at a time; None means 2048, the default.

        The tokens of all videos count together. The results are the same for every size, bit for bit.
        Raises `ValueError` for sizes that are not a multiple of 2048, and for axes other than the tokens' (`dim=1`).
        """
        if dim != 1:
            raise ValueError(f"dim={dim!r} is not possible: chunks are made of tokens, dim=1.")
        size = GROUP if chunk_size is None else chunk_size
        if (whole(size) or 0) < 1 or size % GROUP:
            raise ValueError(
                f"chunk_size={chunk_size!r} is not possible: it is a multiple of {GROUP}, or None. Tokens are always "
                "multiplied in groups of that many, so that results do not depend on the chunk size."
            )
        self._chunk(int(size))

    def disable_forward_chunking(self) -> None:
        """Compute the feed-forwards for all tokens at once: the same results, for four times the tokens' memory."""
        self._chunk(None)

    def _chunk(self, size: int | None) -> None:
        for module in self.modules():
            if isinstance(module, VideoFeedForward):
                module.chunk_size = size

    def embed_time(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, ofs: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """The time embedding `[B, T]` in the dtype of `hidden_states`, with that of `ofs` where the model has one."""
        time_BT = self.time_embedding(self._sinusoid(hidden_states, timestep, self.config.inner_dim))
        if self.ofs_embedding is None or ofs is None:
            return time_BT
        assert self.config.ofs_embed_dim is not None
        return time_BT + self.ofs_embedding(self._sinusoid(hidden_states, ofs, self.config.ofs_embed_dim))

    def _sinusoid(self, like: torch.Tensor, value: torch.Tensor | float, dim: int) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or value.device != like.device:
            value = torch.as_tensor(value, device=like.device)  # only if it must: a trace would fix the dtype
        values_B = value.reshape(-1).expand(like.shape[0])
        config = self.config
        embedding = timestep_embedding(
            values_B, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        return embedding.to(like.dtype)

    def _latents(self, x_BLC: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Put the patches' latents where they belong: tokens `[B, F·h·w, ·]` to `[B, F, out_channels, H, W]`."""
        config = self.config
        grid = token_grid(config, shape[1], shape[3], shape[4])
        patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        x = x_BLC.unflatten(2, (config.out_channels, *patch)).unflatten(1, grid)  # B F h w C t p q
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def _check(
        self,
        latents: torch.Tensor,
        timestep_cond: Any,
        ofs: Any,
        rotary: Any,
        attention_kwargs: Mapping[str, Any] | None,
    ) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[2] != config.in_channels:
            raise ValueError(
                f"hidden_states must be [batch, frames, {config.in_channels}, height, width]; they are "
                f"{list(latents.shape)}."
            )
        if timestep_cond is not None or attention_kwargs:
            raise ValueError("timestep_cond and attention_kwargs are not possible: these models do not use them.")
        if config.use_rotary_positional_embeddings != (rotary is not None):
            needs = "needs" if rotary is None else "has no rotary positions, so it takes no"
            raise ValueError(f"This transformer {needs} image_rotary_emb; see lowtide.models.video_positions.")
        if (self.ofs_embedding is None) != (ofs is None):
            raise ValueError(f"This transformer {'needs' if ofs is None else 'takes no'} ofs.")
