"""The image autoencoder of Stable Diffusion (Esser et al. 2021; Rombach et al. 2022): pictures to latents and back."""

from itertools import pairwise

import torch
from torch import nn

from lowtide.activations.row_streaming import row_streaming_of
from lowtide.activations.run import RowSink
from lowtide.activations.tiling import Tiles
from lowtide.models.autoencoder import AutoencoderMixin, both
from lowtide.models.layers import Downsample2D, Linear, ResnetBlock2D, Upsample2D, silu_of_fresh
from lowtide.models.tile_attributes import TileAttribute
from lowtide.models.vae_config import AutoencoderKLConfig
from lowtide.ops.attention import DEFAULT, AttentionBackend, attention
from lowtide.ops.convolution import in_faster_layout
from lowtide.weights.names import VAE_NAMES

EPS = 1e-6  # for every norm in the published autoencoders


def _resnet(config: AutoencoderKLConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, time_channels=None, groups=config.norm_num_groups, eps=EPS)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, around a shortcut."""

    attention_backend: AttentionBackend = DEFAULT

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        # The second entry is the training dropout of the published models: it keeps the key "to_out.0".
        self.to_out = nn.ModuleList([Linear(channels, channels), nn.Identity()])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        h_BLC = self.group_norm(x_BCHW.flatten(2)).transpose(1, 2)
        q, k, v = (to(h_BLC)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        h_BLC = self.to_out[0](attention(q, k, v, None, self.attention_backend)[:, 0])
        return h_BLC.transpose(1, 2).reshape(x_BCHW.shape) + x_BCHW


class MidBlock(nn.Module):
    """Residual block, attention (where the model has it), residual block at the latents' resolution."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        attends = [AttentionBlock(channels, config.norm_num_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attends)
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        x_BCHW = self.resnets[0](x_BCHW)
        for attend in self.attentions:
            x_BCHW = attend(x_BCHW)
        return self.resnets[1](x_BCHW)


class DownEncoderBlock2D(nn.Module):
    """Residual blocks, then a downsampling except at the last level."""

    def __init__(self, config: AutoencoderKLConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        out, source = channels[level], channels[max(level - 1, 0)]
        widths = [source] + [out] * config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(out, padding=0)])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C', H/2, W/2]` (`[B, C', H, W]` at the last level)."""
        for resnet in self.resnets:
            x_BCHW = resnet(x_BCHW)
        return x_BCHW if self.downsamplers is None else self.downsamplers[0](x_BCHW)


class UpDecoderBlock2D(nn.Module):
    """Residual blocks, then an upsampling except at the last level."""

    def __init__(self, config: AutoencoderKLConfig, index: int) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        out, source = channels[index], channels[max(index - 1, 0)]
        widths = [source] + [out] * (config.layers_per_block + 1)
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        last = index == len(channels) - 1
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(out)])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C', 2H, 2W]` (`[B, C', H, W]` at the last level)."""
        for resnet in self.resnets:
            x_BCHW = resnet(x_BCHW)
        return x_BCHW if self.upsamplers is None else self.upsamplers[0](x_BCHW)


class Encoder(nn.Module):
    """Pictures `[B, 3, H, W]` to the moments of the latents, `[B, 2·latent_channels, H/8, W/8]`."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownEncoderBlock2D(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode; the factor 8 is `config.scale`."""
        x = self.conv_in(in_faster_layout(x))
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(silu_of_fresh(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents `[B, latent_channels, h, w]` to pictures `[B, 3, 8h, 8w]`."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpDecoderBlock2D(config, index) for index in range(len(channels)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=EPS)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Decode; the factor 8 is `config.scale`."""
        z = self.mid_block(self.conv_in(in_faster_layout(z)))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(silu_of_fresh(self.conv_norm_out(z)))


class AutoencoderKL(AutoencoderMixin):
    """Encode pictures in [-1, 1] to a normal distribution over latents, and decode latents to pictures.

    Shapes: pictures `[B, 3, H, W]` with H and W multiples of `config.scale` (8), latents `[B, 4, H/8, W/8]`, not yet
    multiplied by `config.scaling_factor`.
    """

    config_class = AutoencoderKLConfig
    names = VAE_NAMES
    config: AutoencoderKLConfig
    tile_sample_min_size = TileAttribute("height", "width")
    tile_latent_min_size = TileAttribute("height", "width", in_latents=True)
    tile_overlap_factor = TileAttribute("overlap_height", "overlap_width")

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    def usual_tiles(self) -> Tiles:
        """The published size with a quarter of overlap."""
        return Tiles(*both(self.config.sample_size), 0.25, 0.25)

    def decode_rows(self, z: torch.Tensor, write: RowSink) -> None:
        """Decode one picture's latents `[1, 4, H/8, W/8]` and hand finished rows to `write`, from top to bottom.

        `write(first, rows)` takes the number of the first row and `[1, 3, rows, W]`. The picture is never held whole
        where it is decoded row by row or in tiles (`enable_tiling`).
        """
        streaming = row_streaming_of(self.decoder)
        if streaming is not None:
            streaming.stream(z if self.post_quant_conv is None else self.post_quant_conv(z), write)
        elif self.needs_tiles(z, self.config.scale):
            self.write_tiles(z, write)
        else:
            write(0, self.pixels(z))

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and log variance `[B, 8, H/8, W/8]` of whole pictures."""
        moments = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def pixels(self, z: torch.Tensor) -> torch.Tensor:
        """The pictures of latents, decoded whole."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
