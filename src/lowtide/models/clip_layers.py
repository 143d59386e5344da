"""The layers of CLIP's two towers (Radford et al. 2021). Shapes: `B` texts or pictures, `L` tokens, `C` their width."""

from __future__ import annotations

import torch
from torch import nn

from lowtide.models.encoder_configs import CLIPEntries
from lowtide.models.nonlinearities import NONLINEARITIES
from lowtide.ops.attention import DEFAULT, AttentionBackend, attention


class CLIPAttention(nn.Module):
    """Attention of tokens to each other, or to those before them (`causal`)."""

    def __init__(self, config: CLIPEntries, *, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.attention_backend: AttentionBackend = DEFAULT
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend; a `mask` `[B, 1, L, L]` says what a causal layer may see as well."""
        q_BNLH, k_BNLH, v_BNLH = (self._by_heads(to(x_BLC)) for to in (self.q_proj, self.k_proj, self.v_proj))
        causal = self.causal and mask is None
        scale = q_BNLH.shape[-1] ** -0.5
        x_BNLH = attention(q_BNLH, k_BNLH, v_BNLH, mask, self.attention_backend, scale=scale, causal=causal)
        return self.out_proj(x_BNLH.transpose(1, 2).reshape(x_BLC.shape))

    def _by_heads(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CLIPMLP(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self, config: CLIPEntries) -> None:
        super().__init__()
        self.nonlinearity = NONLINEARITIES[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Compute each token by itself."""
        x_BLF = self.fc1(x_BLC)
        return self.fc2(self.nonlinearity(x_BLF))


class CLIPEncoderLayer(nn.Module):
    """Attention, then two linear layers; each adds to the normalised states that it reads."""

    def __init__(self, config: CLIPEntries, *, causal: bool) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer's states from those before it."""
        x_BLC = x_BLC + self.self_attn(self.layer_norm1(x_BLC), mask)
        return x_BLC + self.mlp(self.layer_norm2(x_BLC))


class CLIPEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPEntries, *, causal: bool) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([CLIPEncoderLayer(config, causal=causal) for _ in layers])

    def forward(
        self, x_BLC: torch.Tensor, mask: torch.Tensor | None = None, kept: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Compute the states of the last layer; `kept` is given the embeddings and the states of every layer."""
        for layer in self.layers:
            if kept is not None:
                kept.append(x_BLC)
            x_BLC = layer(x_BLC, mask)
        if kept is not None:
            kept.append(x_BLC)
        return x_BLC
