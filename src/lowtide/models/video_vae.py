"""The video autoencoder of CogVideoX (Yang et al. 2024, sec. 2.1): clips to latents and back, causal in time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from lowtide.activations.frame_cache import (
    FrameCache,
    batches_gone_through,
    frames_made,
    latent_frames_made,
    only_batch,
)
from lowtide.activations.row_streaming import row_streaming_of
from lowtide.activations.tiling import Tiles, sliced
from lowtide.models.autoencoder import AutoencoderMixin
from lowtide.models.layers import silu_of_fresh
from lowtide.models.tile_attributes import TileAttribute
from lowtide.models.video_vae_config import AutoencoderKLCogVideoXConfig
from lowtide.models.video_vae_layers import (
    EPS,
    CausalConv3d,
    Downsample3D,
    ResnetBlock3D,
    SpatialNorm3D,
    Upsample3D,
    normed,
)
from lowtide.ops.convolution import in_faster_layout

FrameSink = Callable[[int, torch.Tensor], None]
"""Called with the number of the first frame and finished frames `[B, 3, frames, H, W]`; in order, each frame once."""


def _resnets(config: AutoencoderKLCogVideoXConfig, widths: list[int], latents: int | None) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock3D(a, b, groups=config.norm_num_groups, eps=config.norm_eps, latents=latents)
        for a, b in pairwise(widths)
    )


class MidBlock(nn.Module):
    """Two residual blocks at the latents' resolution."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig, latents: int | None) -> None:
        super().__init__()
        self.resnets = _resnets(config, [config.block_out_channels[-1]] * 3, latents)

    def forward(self, x_BCFHW: torch.Tensor, z: torch.Tensor | None, cache: FrameCache) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C, F, H, W]`."""
        for resnet in self.resnets:
            x_BCFHW = resnet(x_BCFHW, z, cache)
        return x_BCFHW


class DownBlock(nn.Module):
    """Residual blocks, then a downsampling except at the last level; the first levels also halve the frames."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        out, source = channels[level], channels[max(level - 1, 0)]
        self.resnets = _resnets(config, [source] + [out] * config.layers_per_block, None)
        last = level == len(channels) - 1
        down = None if last else Downsample3D(out, compress_time=level < config.temporal_levels)
        self.downsamplers = None if down is None else nn.ModuleList([down])

    def forward(self, x_BCFHW: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C', F', H/2, W/2]` (the same size at the last level)."""
        for resnet in self.resnets:
            x_BCFHW = resnet(x_BCFHW, None, cache)
        return x_BCFHW if self.downsamplers is None else self.downsamplers[0](x_BCFHW)


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling except at the last level; the first levels also double the frames."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig, index: int) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        out, source = channels[index], channels[max(index - 1, 0)]
        self.resnets = _resnets(config, [source] + [out] * (config.layers_per_block + 1), config.latent_channels)
        last = index == len(channels) - 1
        up = None if last else Upsample3D(out, compress_time=index < config.temporal_levels)
        self.upsamplers = None if up is None else nn.ModuleList([up])

    def forward(self, x_BCFHW: torch.Tensor, z: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """`[B, C, F, H, W]` to `[B, C', F', 2H, 2W]` (the same size at the last level)."""
        for resnet in self.resnets:
            x_BCFHW = resnet(x_BCFHW, z, cache)
        return x_BCFHW if self.upsamplers is None else self.upsamplers[0](x_BCFHW)


class Encoder(nn.Module):
    """Clips `[B, 3, F, H, W]` to the moments of the latents, `[B, 2·latent_channels, f, H/8, W/8]`."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = CausalConv3d(config.in_channels, channels[0], 3)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config, None)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels, 3)

    def forward(self, x: torch.Tensor, cache: FrameCache | None = None) -> torch.Tensor:
        """Encode one batch of frames; `cache` remembers the frames before it."""
        cache = cache or only_batch()
        x = self.conv_in(in_faster_layout(x), cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, None, cache)
        return self.conv_out(silu_of_fresh(self.norm_out(x)), cache)


class Decoder(nn.Module):
    """Latents `[B, latent_channels, f, h, w]` to clips `[B, 3, F, 8h, 8w]`."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = CausalConv3d(config.latent_channels, channels[-1], 3)
        self.mid_block = MidBlock(config, config.latent_channels)
        self.up_blocks = nn.ModuleList(UpBlock(config, index) for index in range(len(channels)))
        self.norm_out = SpatialNorm3D(channels[0], config.latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3d(channels[0], config.out_channels, 3)

    def forward(self, z: torch.Tensor, cache: FrameCache | None = None) -> torch.Tensor:
        """Decode one batch of latent frames; `cache` remembers the frames before it."""
        cache = cache or only_batch()
        z = in_faster_layout(z)
        x = self.mid_block(self.conv_in(z, cache), z, cache)
        for block in self.up_blocks:
            x = block(x, z, cache)
        return self.conv_out(silu_of_fresh(normed(self.norm_out, x, z, cache)), cache)


class AutoencoderKLCogVideoX(AutoencoderMixin):
    """Encode clips in [-1, 1] to a normal distribution over latents, and decode latents to clips.

    Shapes: clips `[B, 3, F, H, W]` with H and W multiples of `config.scale` (8), latents `[B, 16, (F-1)/4 + 1, H/8,
    W/8]`, not yet multiplied by `config.scaling_factor`. As published, a clip is decoded `num_latent_frames_batch_size`
    latent frames at a time and encoded `num_sample_frames_batch_size` frames at a time: the norms take
    their statistics from one batch, so another batch size gives a different clip. A batch as large as the clip has the
    statistics of the whole clip.
    """

    config_class = AutoencoderKLCogVideoXConfig
    config: AutoencoderKLCogVideoXConfig
    tile_sample_min_height = TileAttribute("height")
    tile_sample_min_width = TileAttribute("width")
    tile_latent_min_height = TileAttribute("height", in_latents=True)
    tile_latent_min_width = TileAttribute("width", in_latents=True)
    tile_overlap_factor_height = TileAttribute("overlap_height")
    tile_overlap_factor_width = TileAttribute("overlap_width")

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.num_latent_frames_batch_size = 2
        self.num_sample_frames_batch_size = 8

    @property
    def quant_conv(self) -> None:
        """None: no published model has one."""
        return

    post_quant_conv = quant_conv

    def usual_tiles(self) -> Tiles:
        """Half the published height and width, with a sixth and a fifth of overlap."""
        return Tiles(self.config.sample_height // 2, self.config.sample_width // 2, 1 / 6, 1 / 5)

    def decode_frames(self, z: torch.Tensor, write: FrameSink) -> None:
        """Decode latents `[B, 16, f, h, w]` and hand finished frames to `write`, a batch of frames at a time.

        `write(first, frames)` takes the number of the first frame and `[B, 3, frames, H, W]`. The clip is never held
        whole, except in blended tiles, which are as long as it is.
        """
        if self.needs_tiles(z, self.config.scale):
            write(0, self.decode(z, return_dict=False)[0])  # type: ignore[index]
        else:
            _by_frames(self.decoder, z, self.num_latent_frames_batch_size, write)

    def check_decoding(self, shape: tuple[int, ...]) -> None:
        """Raise the `ValueError` or `OSError` that decoding latents `[1, 16, f, h, w]` row by row would raise."""
        streaming, cache, checked = row_streaming_of(self.decoder), FrameCache(), set()
        for batch in cache.batches(shape[2], self.num_latent_frames_batch_size):
            form = (batch.stop - batch.start, cache.has_before, cache.is_last)
            if streaming is not None and form not in checked:
                streaming.check((*shape[:2], form[0], *shape[3:]), cache)
            checked.add(form)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and log variance `[B, 32, f, H/8, W/8]` of clips, a batch of frames at a time."""
        size, ratio = self.num_sample_frames_batch_size, int(self.config.temporal_compression_ratio)
        return _joined(self.encoder, x, size, latent_frames_made(x.shape[2], size, ratio))

    def pixels(self, z: torch.Tensor) -> torch.Tensor:
        """The clips of latents, a batch of frames at a time."""
        size, ratio = self.num_latent_frames_batch_size, int(self.config.temporal_compression_ratio)
        return _joined(self.decoder, z, size, frames_made(z.shape[2], size, ratio))


def _joined(network: nn.Module, x: torch.Tensor, size: int, total: int) -> torch.Tensor:
    """The whole clip of `total` frames that `network` makes of batches of frames."""
    if len(x) > 1 and row_streaming_of(network) is not None:
        return sliced(lambda clip: _joined(network, clip, size, total), x)
    out: list[torch.Tensor] = []

    def put(first: int, frames: torch.Tensor) -> None:
        if not out:
            is_all = frames.shape[2] == total
            out.append(frames if is_all else frames.new_empty((*frames.shape[:2], total, *frames.shape[3:])))
        if out[0] is not frames:
            out[0][:, :, first : first + frames.shape[2]] = frames

    _by_frames(network, x, size, put)
    return out[0]


def _by_frames(network: nn.Module, x: torch.Tensor, size: int, write: FrameSink) -> None:
    """Compute batches of `size` frames in order, each with the frames before it that the convolutions remember."""
    cache, first = FrameCache(size), 0
    for batch in batches_gone_through(x, cache.batches(x.shape[2], size)):
        frames = network(x[:, :, batch], cache)
        write(first, frames)
        first += frames.shape[2]
        del frames
