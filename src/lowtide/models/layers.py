"""Layers shared by the image models: time embedding, residual block, resampling, attention, feed-forward.

Shapes: `B` images, `C` channels, `H W` rows and columns, `L` tokens, `S` context tokens, `T` time-embedding width.
Attribute names are the published checkpoints' own, so a state dict loads without a key map.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lowtide.ops.attention import DEFAULT, AttentionBackend, attention
from lowtide.ops.convolution import conv2d
from lowtide.ops.gating import gated_gelu
from lowtide.ops.modes import is_traced
from lowtide.ops.product import linear


def timestep_embedding(
    timesteps_B: torch.Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> torch.Tensor:
    """Sinusoidal embedding `[B, dim]` of `timesteps_B`, in fp32 (Vaswani et al. 2017, sec. 3.5)."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    frequencies = torch.exp(exponent / (half - freq_shift))
    angles = timesteps_B[:, None].float() * frequencies[None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    embedding = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def silu_of_fresh(x: torch.Tensor) -> torch.Tensor:
    """SiLU of a tensor that nobody else holds: in place, which spares a whole map, but for gradients and traces."""
    return F.silu(x, inplace=not (is_traced() or torch.is_grad_enabled()))


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn a sinusoidal embedding `[B, C]` into the network's time embedding `[B, T]`."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_channels, time_embed_dim)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim)

    def forward(self, embedding_BC: torch.Tensor) -> torch.Tensor:
        """`[B, C]` to `[B, T]`."""
        return self.linear_2(F.silu(self.linear_1(embedding_BC)))


class Linear(nn.Linear):
    """A product `[..., in_features]` to `[..., out_features]` by the library that is fastest on the processor."""

    only_multiplies = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        return linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """A convolution `[B, in_channels, H, W]` to `[B, out_channels, h, w]` in the form best suited to the map's size."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, size, stride=stride, padding=padding)

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.padding_mode != "zeros":  # a script may set "circular", for pictures without seams
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, a time shift between them, and a shortcut around them.

    Source: Ho et al. 2020, app. B. `time_channels=None` builds the autoencoder's block, which knows no time.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_channels: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: torch.Tensor, time_BT: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        h = self.conv1(silu_of_fresh(self.norm1(x_BCHW)))
        if self.time_emb_proj is not None:
            assert time_BT is not None
            h = h + self.time_emb_proj(F.silu(time_BT))[:, :, None, None]
        h = self.norm2(h)  # the map before the norm is free from here on
        h = self.conv2(silu_of_fresh(h))
        return h + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Downsample2D(nn.Module):
    """Halve rows and columns with a strided 3x3 convolution.

    `padding=1` pads all round (the U-Net); `padding=0` pads right and bottom only (the autoencoder).
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, ⌈H/2⌉, ⌈W/2⌉]` (the autoencoder's: `⌊H/2⌋`, `⌊W/2⌋`)."""
        if self.conv.padding == (0, 0):
            x_BCHW = F.pad(x_BCHW, (0, 1, 0, 1))
        return self.conv(x_BCHW)


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbour, twofold or to a given size, then convolve 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]`, or to `[B, C, *size]` where a size is given."""
        if size is None:
            return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention over tokens: self-attention, or cross-attention to a context."""

    attention_backend: AttentionBackend = DEFAULT

    def __init__(self, channels: int, *, heads: int, head_dim: int, context_channels: int | None = None) -> None:
        super().__init__()
        inner, source = heads * head_dim, context_channels or channels
        self.heads = heads
        self.to_q = Linear(channels, inner, bias=False)
        self.to_k = Linear(source, inner, bias=False)
        self.to_v = Linear(source, inner, bias=False)
        # The second entry is the training dropout of the published models: it keeps the key "to_out.0".
        self.to_out = nn.ModuleList([Linear(inner, channels), nn.Identity()])

    def forward(
        self, x_BLC: torch.Tensor, context_BSC: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`; keys and values come from `context_BSC` `[B, S, context]` or from x itself."""
        source = x_BLC if context_BSC is None else context_BSC
        q_BNLH, k_BNSH, v_BNSH = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x_BLC), self.to_k(source), self.to_v(source))
        )
        out_BNLH = attention(q_BNLH, k_BNSH, v_BNSH, mask, self.attention_backend)
        return self.to_out[0](out_BNLH.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020, eq. 6)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(channels, inner * 2)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, inner]`."""
        return gated_gelu(self.proj(x_BLC))


class FeedForward(nn.Module):
    """The transformer's feed-forward: GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        return self.net[2](self.net[0](x_BLC))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a layer norm and around a shortcut."""

    def __init__(self, channels: int, *, heads: int, head_dim: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x_BLC: torch.Tensor, context_BSC: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        x_BLC = x_BLC + self.attn1(self.norm1(x_BLC))
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), context_BSC, mask)
        return x_BLC + self.ff(self.norm3(x_BLC))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, as tokens (Rombach et al. 2022, app. E.2.1)."""

    def __init__(
        self, channels: int, *, heads: int, head_dim: int, layers: int, context_channels: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, inner) if linear else Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads=heads, head_dim=head_dim, context_channels=context_channels)
            for _ in range(layers)
        )
        self.proj_out = Linear(inner, channels) if linear else Conv2d(inner, channels, 1)

    def forward(
        self, x_BCHW: torch.Tensor, context_BSC: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`, attending to the text `[B, S, context]`."""
        rows = x_BCHW.shape[2]
        h = self.norm(x_BCHW)
        h_BLC = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h_BLC = block(h_BLC, context_BSC, mask)
        h = _image(self.proj_out(h_BLC), rows) if self.linear else self.proj_out(_image(h_BLC, rows))
        return h + x_BCHW


# Copies, for as views of the map the tokens would be rearranged again by every norm and addition that follows.
def _tokens(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def _image(x_BLC: torch.Tensor, rows: int) -> torch.Tensor:
    return x_BLC.transpose(1, 2).unflatten(2, (rows, -1)).contiguous()
