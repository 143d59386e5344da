"""The blocks of the U-Net: down, middle, up. Shapes are those of `layers`; skips are maps kept for the up blocks."""

import torch
from torch import nn

from lowtide.models.layers import Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D
from lowtide.models.unet_config import CROSS_ATTENTION_BLOCKS, UNet2DConditionConfig


def _transformer(config: UNet2DConditionConfig, level: int, channels: int) -> Transformer2DModel:
    heads = config.heads(level)
    return Transformer2DModel(
        channels,
        heads=heads,
        head_dim=channels // heads,
        layers=config.layers(level),
        context_channels=config.cross_attention_dim,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
    )


def _resnet(config: UNet2DConditionConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    time_channels = config.block_out_channels[0] * 4
    return ResnetBlock2D(
        in_channels, out_channels, time_channels=time_channels, groups=config.norm_num_groups, eps=config.norm_eps
    )


class DownBlock2D(nn.Module):
    """Residual blocks, each with attention in the cross-attention kind; then a downsampling, not at the last level."""

    def __init__(self, config: UNet2DConditionConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        out, source = channels[level], channels[max(level - 1, 0)]
        attends = config.down_block_types[level] in CROSS_ATTENTION_BLOCKS
        count = config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, source if i == 0 else out, out) for i in range(count))
        self.attentions = nn.ModuleList(_transformer(config, level, out) for _ in range(count)) if attends else None
        last = level == len(channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(out, padding=1)])

    def forward(
        self, x_BCHW: torch.Tensor, time_BT: torch.Tensor, context_BSC: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the map for the next level and the skips of this one, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(x_BCHW, time_BT)
            if self.attentions is not None:
                x_BCHW = self.attentions[i](x_BCHW, context_BSC, mask)
            skips.append(x_BCHW)
        if self.downsamplers is not None:
            x_BCHW = self.downsamplers[0](x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW, skips


class UNetMidBlock2DCrossAttn(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__()
        level = len(config.block_out_channels) - 1
        channels = config.block_out_channels[level]
        self.attentions = nn.ModuleList([_transformer(config, level, channels)])
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))

    def forward(
        self, x_BCHW: torch.Tensor, time_BT: torch.Tensor, context_BSC: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        x_BCHW = self.resnets[0](x_BCHW, time_BT)
        x_BCHW = self.attentions[0](x_BCHW, context_BSC, mask)
        return self.resnets[1](x_BCHW, time_BT)


class UpBlock2D(nn.Module):
    """Residual blocks over the map joined with a skip, attention as in down blocks, an upsampling above level 0."""

    def __init__(self, config: UNet2DConditionConfig, index: int) -> None:
        super().__init__()
        channels = config.block_out_channels
        level = len(channels) - 1 - index
        out, below, finer = channels[level], channels[min(level + 1, len(channels) - 1)], channels[max(level - 1, 0)]
        attends = config.up_block_types[index] in CROSS_ATTENTION_BLOCKS
        count = config.layers_per_block + 1
        self.resnets = nn.ModuleList(
            _resnet(config, (below if i == 0 else out) + (finer if i == count - 1 else out), out) for i in range(count)
        )
        self.attentions = nn.ModuleList(_transformer(config, level, out) for _ in range(count)) if attends else None
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample2D(out)])

    def forward(
        self,
        x_BCHW: torch.Tensor,
        skips: list[torch.Tensor],
        time_BT: torch.Tensor,
        context_BSC: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Consume this level's maps from the end of `skips`; the next skip's size is the size to enlarge to."""
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(torch.cat([x_BCHW, skips.pop()], dim=1), time_BT)
            if self.attentions is not None:
                x_BCHW = self.attentions[i](x_BCHW, context_BSC, mask)
        if self.upsamplers is not None:
            rows, columns = skips[-1].shape[2:]
            x_BCHW = self.upsamplers[0](x_BCHW, (rows, columns))
        return x_BCHW
