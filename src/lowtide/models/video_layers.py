"""Layers of the video transformer. Text and video are one tensor of tokens, `[B, L, C]`, the text first.

Shapes: `S` text tokens, `L` tokens in all, `N H` heads and their size, `T` time-embedding width. Attribute names are
the published checkpoints' own. What a layer has just made itself it changes in place: a map of tokens is the largest
thing there is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lowtide.models.layers import Linear
from lowtide.models.video_positions import add_sincos, rotate, sincos_table, token_grid
from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig
from lowtide.ops.attention import DEFAULT, AttentionBackend, attention

Rotary = tuple[torch.Tensor, torch.Tensor]
GROUP = 2048
"""Tokens that the feed-forward multiplies at a time: as fast as all of them at once, in a fraction of the memory."""


class PatchEmbed(nn.Module):
    """Tokens of text embeddings and of patches of latents, with positions where the model has no rotary ones."""

    pos_embedding: torch.Tensor

    def __init__(self, config: CogVideoXTransformer3DConfig) -> None:
        super().__init__()
        patch, width = config.patch_size, config.inner_dim
        self.config = config
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, width, patch, stride=patch, bias=config.patch_bias)
        else:
            self.proj = Linear(config.in_channels * config.patch_size_t * patch**2, width)
        self.text_proj = Linear(config.text_embed_dim, width)
        if config.use_learned_positional_embeddings:
            self.register_buffer("pos_embedding", self._first_positions())

    def _first_positions(self) -> torch.Tensor:
        config = self.config
        grid = token_grid(config, config.sample_latent_frames, config.sample_height, config.sample_width)
        if torch.get_default_device().type == "meta":
            return torch.empty(1, config.max_text_seq_length + math.prod(grid), config.inner_dim)
        table = sincos_table(config, grid).float()[None]
        return F.pad(table, (0, 0, config.max_text_seq_length, 0))

    def forward(self, text_BSC: torch.Tensor, latents_BFCHW: torch.Tensor) -> torch.Tensor:
        """Text `[B, S, text_embed_dim]` and latents `[B, F, C, H, W]` to tokens `[B, S + F·h·w, width]`."""
        frames, rows, columns = _sizes(latents_BFCHW)
        grid = token_grid(self.config, frames, rows, columns)
        text_BSC = self.text_proj(text_BSC)
        video_BFhwC = self._patches(latents_BFCHW, grid)
        batch, length, width = text_BSC.shape
        x_BLC = text_BSC.new_empty((batch, length + grid[0] * grid[1] * grid[2], width))
        x_BLC[:, :length] = text_BSC
        tokens_BFhwC = x_BLC[:, length:].unflatten(1, grid)
        tokens_BFhwC.copy_(video_BFhwC)
        if self.config.use_learned_positional_embeddings:
            self._add_learned(x_BLC, tokens_BFhwC, (frames, rows, columns))
        elif not self.config.use_rotary_positional_embeddings:
            add_sincos(tokens_BFhwC, self.config)
        return x_BLC

    def _patches(self, latents_BFCHW: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """A view `[B, F, h, w, width]`; in version 1.5 a patch spans some frames and is projected as one vector."""
        if self.config.patch_size_t is None:
            maps = self.proj(latents_BFCHW.flatten(0, 1))
            return maps.unflatten(0, latents_BFCHW.shape[:2]).permute(0, 1, 3, 4, 2)
        patch, (frames, rows, columns) = self.config.patch_size, grid
        split = latents_BFCHW.unflatten(4, (columns, patch)).unflatten(3, (rows, patch))
        split = split.unflatten(1, (frames, self.config.patch_size_t))  # B F t C h p w q
        return self.proj(split.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4))

    def _add_learned(self, x_BLC: torch.Tensor, tokens_BFhwC: torch.Tensor, sizes: tuple[int, int, int]) -> None:
        """Add the learned positions; the published models use them at the configured sizes alone.

        For another number of frames they add sines and cosines; other heights and widths they do not take.
        """
        config = self.config
        if sizes[1:] != (config.sample_height, config.sample_width):
            raise ValueError(
                f"Latents of {sizes[1]}x{sizes[2]} are not possible: the model has learned its positions for "
                f"{config.sample_height}x{config.sample_width} alone."
            )
        if sizes[0] != config.sample_latent_frames:
            add_sincos(tokens_BFhwC, config)
        elif x_BLC.shape[1] != self.pos_embedding.shape[1]:
            raise ValueError(
                f"encoder_hidden_states must have the {config.max_text_seq_length} tokens that the model has learned "
                "positions for."
            )
        else:
            x_BLC.add_(self.pos_embedding.to(x_BLC.dtype))


class LayerNormZero(nn.Module):
    """Layer norm with scales, shifts and gates from the time, others for text than for video (Peebles & Xie 2023)."""

    def __init__(self, time_channels: int, channels: int, eps: float) -> None:
        super().__init__()
        self.linear = Linear(time_channels, 6 * channels)
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(
        self, x_BLC: torch.Tensor, time_BT: torch.Tensor, text: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens `[B, L, C]`, of which the first `text` are text, and the gates of text and video `[B, 1, C]`."""
        parts = self.linear(F.silu(time_BT))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        x_BLC = self.norm(x_BLC)
        x_BLC[:, :text].mul_(1 + text_scale).add_(text_shift)
        x_BLC[:, text:].mul_(1 + scale).add_(shift)
        return x_BLC, text_gate, gate


class AdaLayerNorm(nn.Module):
    """Layer norm with a scale and a shift from the time."""

    def __init__(self, time_channels: int, channels: int, eps: float) -> None:
        super().__init__()
        self.linear = Linear(time_channels, 2 * channels)
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x_BLC: torch.Tensor, time_BT: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        shift, scale = self.linear(F.silu(time_BT))[:, None].chunk(2, dim=-1)
        return self.norm(x_BLC).mul_(1 + scale).add_(shift)


class VideoAttention(nn.Module):
    """Attention of all tokens to all, text and video alike; each head's queries and keys are normalised first."""

    attention_backend: AttentionBackend = DEFAULT

    def __init__(self, heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-6)
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(width, width, bias=bias)
        self.to_v = Linear(width, width, bias=bias)
        # The second entry is the training dropout of the published models: it keeps the key "to_out.0".
        self.to_out = nn.ModuleList([Linear(width, width), nn.Identity()])

    def forward(self, x_BLC: torch.Tensor, text: int, rotary: Rotary | None = None) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`; `rotary` turns queries and keys of the tokens after the first `text`."""
        q_BLNH = self.norm_q(self._split(self.to_q(x_BLC)))
        k_BLNH = self.norm_k(self._split(self.to_k(x_BLC)))
        v_BLNH = self._split(self.to_v(x_BLC))
        if rotary is not None:
            rotate(q_BLNH[:, text:], rotary)
            rotate(k_BLNH[:, text:], rotary)
        q_BNLH, k_BNLH, v_BNLH = (tokens.transpose(1, 2) for tokens in (q_BLNH, k_BLNH, v_BLNH))
        del q_BLNH, k_BLNH, v_BLNH
        out_BNLH = attention(q_BNLH, k_BNLH, v_BNLH, None, self.attention_backend)
        del q_BNLH, k_BNLH, v_BNLH
        return self.to_out[0](out_BNLH.transpose(1, 2).flatten(2))

    def _split(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return x_BLC.unflatten(2, (self.heads, -1))


class GELU(nn.Module):
    """A linear layer, then GELU by its approximation with tanh (Hendrycks & Gimpel 2016, sec. 2)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(channels, inner)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, inner]`."""
        return F.gelu(self.proj(x_BLC), approximate="tanh")


class VideoFeedForward(nn.Module):
    """The feed-forward: to four times the width and back, some tokens at a time (Kitaev et al. 2020, sec. 3).

    Tokens are multiplied in groups of `GROUP`, whatever the chunk: libraries choose a product's order of additions by
    its size, so only products of the same sizes give the same bits. `chunk_size` tokens of all videos together, whole
    groups, are four times as wide at once; None: all.
    """

    works_as_one = True
    """Its layers are called for every group, and their weights must not come and go as often."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.chunk_size: int | None = GROUP
        self.net = nn.ModuleList([GELU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        tokens = x_BLC.flatten(0, -2)
        groups = _groups(len(tokens))
        if len(groups) == 1:
            return self.net[2](self.net[0](x_BLC))
        out = torch.empty_like(tokens)
        at_once = len(groups) if self.chunk_size is None else self.chunk_size // GROUP
        for first in range(0, len(groups), at_once):
            chunk = groups[first : first + at_once]
            wide = [self.net[0](tokens[group]) for group in chunk]
            for place, group in enumerate(chunk):
                out[group] = self.net[2](wide[place])
        return out.view_as(x_BLC)


def _groups(tokens: int) -> list[slice]:
    """Slices of `GROUP` tokens; the last takes the remainder as well."""
    starts = [GROUP * n for n in range(max(1, tokens // GROUP))]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], tokens], strict=True)]


class VideoBlock(nn.Module):
    """Attention and feed-forward, each after a norm, with a gate and a shortcut (Yang et al. 2024, sec. 2.2)."""

    def __init__(self, config: CogVideoXTransformer3DConfig) -> None:
        super().__init__()
        width, time, eps = config.inner_dim, config.time_embed_dim, config.norm_eps
        self.norm1 = LayerNormZero(time, width, eps)
        self.attn1 = VideoAttention(config.num_attention_heads, config.attention_head_dim, bias=config.attention_bias)
        self.norm2 = LayerNormZero(time, width, eps)
        self.ff = VideoFeedForward(width)

    def forward(
        self, x_BLC: torch.Tensor, time_BT: torch.Tensor, text: int, rotary: Rotary | None = None
    ) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`, the first `text` tokens being text."""
        h_BLC, text_gate, gate = self.norm1(x_BLC, time_BT, text)
        h_BLC = self.attn1(h_BLC, text, rotary)
        x_BLC = _gated_sum(x_BLC, h_BLC, text_gate, gate, text)
        h_BLC, text_gate, gate = self.norm2(x_BLC, time_BT, text)
        return _gated_sum(x_BLC, self.ff(h_BLC), text_gate, gate, text)


def _gated_sum(
    x_BLC: torch.Tensor, fresh_BLC: torch.Tensor, text_gate: torch.Tensor, gate: torch.Tensor, text: int
) -> torch.Tensor:
    """`x + gate · fresh`, in the place of `fresh`."""
    fresh_BLC[:, :text].mul_(text_gate)
    fresh_BLC[:, text:].mul_(gate)
    return fresh_BLC.add_(x_BLC)


def _sizes(latents_BFCHW: torch.Tensor) -> tuple[int, int, int]:
    _, frames, _, rows, columns = latents_BFCHW.shape
    return frames, rows, columns
