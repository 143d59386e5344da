"""The layers of T5's encoder (Raffel et al. 2020, sec. 2.1). Shapes: `B` texts, `L` tokens, `C` their width, `N` heads.

Norms only scale, and attention knows places by a bias for each distance, which the first layer holds for all.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lowtide.models.encoder_configs import T5Entries
from lowtide.models.nonlinearities import NONLINEARITIES
from lowtide.ops.attention import DEFAULT, AttentionBackend, attention

HALF = (torch.float16, torch.bfloat16)
BELOW_LARGEST = 1000
"""How far below the largest number of float16 states are kept, once one of them was infinite."""


class T5LayerNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019, eq. 4), in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Normalise each token; the result has the dtype of the weight."""
        mean_BL1 = x_BLC.float().pow(2).mean(-1, keepdim=True)
        x_BLC = x_BLC * torch.rsqrt(mean_BL1 + self.eps)
        return self.weight * (x_BLC.to(self.weight.dtype) if self.weight.dtype in HALF else x_BLC)


class T5DenseActDense(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self, config: T5Entries) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.nonlinearity = NONLINEARITIES[config.nonlinearity]

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Compute each token by itself; the result has the dtype of `wo`."""
        x_BLF = self.nonlinearity(self.wi(x_BLC))
        return self.wo(x_BLF.to(self.wo.weight.dtype))  # the dtype of computing, wherever the weight rests


class T5DenseGatedActDense(nn.Module):
    """The same with a gate: another linear layer multiplies what the nonlinearity makes (Shazeer 2020, eq. 6)."""

    def __init__(self, config: T5Entries) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.nonlinearity = NONLINEARITIES[config.nonlinearity]

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Compute each token by itself; the result has the dtype of `wo`."""
        x_BLF = self.nonlinearity(self.wi_0(x_BLC)) * self.wi_1(x_BLC)
        return self.wo(x_BLF.to(self.wo.weight.dtype))


class T5LayerFF(nn.Module):
    """A norm and the linear layers, added to what they read."""

    def __init__(self, config: T5Entries) -> None:
        super().__init__()
        self.DenseReluDense = (T5DenseGatedActDense if config.is_gated else T5DenseActDense)(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Compute each token by itself."""
        return x_BLC + self.DenseReluDense(self.layer_norm(x_BLC))


class T5Attention(nn.Module):
    """Attention of all tokens to all, without a scale: it is in the weights."""

    def __init__(self, config: T5Entries, *, holds_bias: bool) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.buckets, self.farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.attention_backend: AttentionBackend = DEFAULT
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if holds_bias:
            self.relative_attention_bias = nn.Embedding(self.buckets, config.num_heads)

    def forward(
        self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None, bias_BNLL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; `bias_BNLL` is added to the scores. The first layer makes it, with the `mask` in it."""
        q_BNLH, k_BNLH, v_BNLH = (self._by_heads(to(x_BLC)) for to in (self.q, self.k, self.v))
        if bias_BNLL is None:
            bias_BNLL = self.bias_of_places(x_BLC.shape[1], x_BLC.device)
            if mask is not None:
                bias_BNLL = torch.where(mask, bias_BNLL, torch.finfo(k_BNLH.dtype).min)
            bias_BNLL = bias_BNLL.contiguous()
        x_BNLH = attention(q_BNLH, k_BNLH, v_BNLH, bias_BNLL, self.attention_backend, scale=1.0)
        return self.o(x_BNLH.transpose(1, 2).flatten(2)), bias_BNLL

    def bias_of_places(self, length: int, device: torch.device) -> torch.Tensor:
        """A number for each head and each pair of tokens, `[1, N, L, L]`, by their distance."""
        places_L = torch.arange(length, device=device)
        buckets_LL = bucket_of(places_L[None, :] - places_L[:, None], self.buckets, self.farthest)
        return self.relative_attention_bias(buckets_LL).permute(2, 0, 1)[None]

    def _by_heads(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class T5LayerSelfAttention(nn.Module):
    """A norm and attention, added to what they read."""

    def __init__(self, config: T5Entries, *, holds_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, holds_bias=holds_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(
        self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None, bias_BNLL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the states after attention, and the bias that the next layers use."""
        attended_BLC, bias = self.SelfAttention(self.layer_norm(x_BLC), mask, bias_BNLL)
        return x_BLC + attended_BLC, bias


class T5Block(nn.Module):
    """Attention, then the linear layers."""

    def __init__(self, config: T5Entries, *, holds_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, holds_bias=holds_bias), T5LayerFF(config)])

    def forward(
        self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None, bias_BNLL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the block's states, and the bias that the next blocks use."""
        attention, feed_forward = self.layer
        x_BLC, bias = attention(x_BLC, mask, bias_BNLL)
        return _finite(feed_forward(_finite(x_BLC))), bias


def bucket_of(distance: torch.Tensor, buckets: int, farthest: int) -> torch.Tensor:
    """The bucket of each distance (key minus query), one half for each direction (Raffel et al. 2020, sec. 2.1).

    Half of a direction's buckets hold one distance each; the others grow by a factor, up to the `farthest` distance.
    """
    each = buckets // 2
    single = each // 2
    magnitude = distance.abs()
    grown = torch.log(magnitude.float() / single) / math.log(farthest / single) * (each - single)
    shared = (single + grown.to(torch.long)).clamp(max=each - 1)
    return (distance > 0).to(torch.long) * each + torch.where(magnitude < single, magnitude, shared)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """States of float16 kept below infinity, as T5 is computed."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(torch.isinf(x).any(), largest - BELOW_LARGEST, largest)
    return torch.clamp(x, min=-bound, max=bound)
