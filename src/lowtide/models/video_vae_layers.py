"""Layers of the video autoencoder of CogVideoX (Yang et al. 2024, sec. 2.1): causal in time.

Shapes: `B` clips, `C` channels, `F` frames, `H W` rows and columns; z `[B, latents, f, h, w]` is the clip of latents
that a decoder's norms are conditioned on. A clip is computed in batches of frames; between them a `FrameCache` keeps
what the causal convolutions remember. Attribute names are the published checkpoints' own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lowtide.activations.frame_cache import FrameCache
from lowtide.models.layers import silu_of_fresh

EPS = 1e-6  # for the norms whose eps is in no configuration


class CausalConv3d(nn.Module):
    """A convolution that sees a frame and those before it, never those after it."""

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        self.frames = size - 1
        self.conv = nn.Conv3d(in_channels, out_channels, size, padding=(0, size // 2, size // 2))

    def forward(self, x_BCFHW: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """`[B, in_channels, F, H, W]` to `[B, out_channels, F, H, W]`."""
        return self.conv(cache.joined(x_BCFHW, self.frames))


class FrameConv2d(nn.Conv2d):
    """A 3x3 convolution of every frame by itself."""

    def __init__(self, channels: int, *, stride: int, padding: int) -> None:
        super().__init__(channels, channels, 3, stride=stride, padding=padding)

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[B, channels, F, H, W]` to `[B, channels, F, h, w]`."""
        around = self._reversed_padding_repeated_twice
        padding = (0, around[2], around[0])
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, [*around, 0, 0], self.padding_mode), (0, 0, 0)
        stride, dilation = (1, *self.stride), (1, *self.dilation)
        return F.conv3d(input, weight[:, :, None], bias, stride, padding, dilation, self.groups)


class SpatialNorm3D(nn.Module):
    """Group norm whose scale and shift depend on the latents at the same place (Zheng et al. 2022, eq. 5).

    Scale and shift are computed at the latents' size and then enlarged. The other order gives the same numbers, since
    pixels do not mix.
    """

    def __init__(self, channels: int, latents: int, groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv_y = CausalConv3d(latents, channels, 1)
        self.conv_b = CausalConv3d(latents, channels, 1)

    def forward(self, x_BCFHW: torch.Tensor, z: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C, F, H, W]`."""
        scale, shift = self.conv_y(z, cache), self.conv_b(z, cache)
        h = self.norm_layer(x_BCFHW)
        size = h.shape[2:]
        if torch.is_grad_enabled():
            return h * _enlarged(scale, size) + _enlarged(shift, size)
        h = h.mul_(_enlarged(scale, size))
        return h.add_(_enlarged(shift, size))


def _enlarged(z: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Enlarge by nearest neighbour; of an odd number of frames the first one is enlarged by itself."""
    frames, rows, columns = size
    if frames == z.shape[2] or frames % 2 == 0:
        return F.interpolate(z, size=(frames, rows, columns))
    first = F.interpolate(z[:, :, :1], size=(1, rows, columns))
    return torch.cat([first, F.interpolate(z[:, :, 1:], size=(frames - 1, rows, columns))], dim=2)


class ResnetBlock3D(nn.Module):
    """Two causal 3x3x3 convolutions with norm and SiLU, and a shortcut around them.

    The decoder's norms are conditioned on latents of `latents` channels; with None they are group norms.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, latents: int | None) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latents is None:
                return nn.GroupNorm(groups, channels, eps=eps)
            return SpatialNorm3D(channels, latents, groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x_BCFHW: torch.Tensor, z: torch.Tensor | None, cache: FrameCache) -> torch.Tensor:
        """`[B, in_channels, F, H, W]` to `[B, out_channels, F, H, W]`."""
        h = self.conv1(silu_of_fresh(normed(self.norm1, x_BCFHW, z, cache)), cache)
        h = normed(self.norm2, h, z, cache)  # frees the map before the norm
        h = self.conv2(silu_of_fresh(h), cache)
        return h + (x_BCFHW if self.conv_shortcut is None else self.conv_shortcut(x_BCFHW))


def normed(norm: nn.Module, x_BCFHW: torch.Tensor, z: torch.Tensor | None, cache: FrameCache) -> torch.Tensor:
    """The norm of x, conditioned on z where there is one."""
    return norm(x_BCFHW) if z is None else norm(x_BCFHW, z, cache)


class Downsample3D(nn.Module):
    """Halve rows and columns with a strided convolution; with `compress_time` also frames, by averages of two."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = FrameConv2d(channels, stride=2, padding=0)

    def forward(self, x_BCFHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C, ⌈F/2⌉ or F, ⌊H/2⌋, ⌊W/2⌋]`; of an odd number of frames the first stays."""
        if self.compress_time and x_BCFHW.shape[2] > 1:
            x_BCFHW = _halved(x_BCFHW)
        return self.conv(F.pad(x_BCFHW, (0, 1, 0, 1)))


def _halved(x_BCFHW: torch.Tensor) -> torch.Tensor:
    odd = x_BCFHW.shape[2] % 2
    pairs = (x_BCFHW[:, :, odd::2] + x_BCFHW[:, :, odd + 1 :: 2]) / 2
    return torch.cat([x_BCFHW[:, :, :1], pairs], dim=2) if odd else pairs


class Upsample3D(nn.Module):
    """Double rows and columns, then convolve every frame; with `compress_time` frames are doubled too."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = FrameConv2d(channels, stride=1, padding=1)

    def forward(self, x_BCFHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C, 2F or F, 2H, 2W]`; of an odd number of frames the first is not doubled."""
        frames, rows, columns = x_BCFHW.shape[2:]
        if self.compress_time:
            frames = 2 * frames - frames % 2
        return self.conv(_enlarged(x_BCFHW, torch.Size((frames, 2 * rows, 2 * columns))))
