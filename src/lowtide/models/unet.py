"""The denoiser of Stable Diffusion: a U-Net conditioned on time and text (Rombach et al. 2022; Ho et al. 2020)."""

import torch
from torch import nn

from lowtide.models.layers import TimestepEmbedding, silu_of_fresh, timestep_embedding
from lowtide.models.mixin import ModelMixin
from lowtide.models.model_outputs import UNet2DConditionOutput
from lowtide.models.unet_blocks import DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D
from lowtide.models.unet_config import UNet2DConditionConfig


class UNet2DConditionModel(ModelMixin):
    """Predict noise (or velocity) from noisy latents, the time, and the text.

    Shapes: latents `[B, in_channels, H, W]`, time a number, `[]`, `[1]` or `[B]`, text `[B, S, cross_attention_dim]`.
    """

    config_class = UNet2DConditionConfig
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__(config)
        channels = config.block_out_channels
        levels = range(len(channels))
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], channels[0] * 4)
        self.add_embedding = None
        if config.addition_embed_type == "text_time":
            if config.projection_class_embeddings_input_dim is None or config.addition_time_embed_dim is None:
                raise ValueError(
                    "U-Net config: addition_embed_type='text_time' needs projection_class_embeddings_input_dim and "
                    "addition_time_embed_dim."
                )
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, channels[0] * 4)
        self.down_blocks = nn.ModuleList(DownBlock2D(config, level) for level in levels)
        self.mid_block = UNetMidBlock2DCrossAttn(config)
        self.up_blocks = nn.ModuleList(UpBlock2D(config, index) for index in levels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Denoise once.

        `encoder_attention_mask` `[B, S]` (true or 1 attends) hides text tokens. `added_cond_kwargs` holds
        `text_embeds` `[B, P]` and `time_ids` `[B, 6]` for models with `addition_embed_type="text_time"`.
        Returns an output with `.sample` `[B, out_channels, H, W]`, or a tuple of it where `return_dict` is false.
        """
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        time_BT = self.embed_time(sample, timestep, added_cond_kwargs)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, kept = block(x, time_BT, encoder_hidden_states, mask)
            skips += kept
        x = self.mid_block(x, time_BT, encoder_hidden_states, mask)
        for block in self.up_blocks:
            x = block(x, skips, time_BT, encoder_hidden_states, mask)
        x = self.conv_out(silu_of_fresh(self.conv_norm_out(x)))
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def embed_time(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, added: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """The time embedding `[B, T]` in the dtype of `sample`, with SDXL's additions where the model has them."""
        if not isinstance(timestep, torch.Tensor) or timestep.device != sample.device:
            timestep = torch.as_tensor(timestep, device=sample.device)  # only if it must: a trace would fix the dtype
        timesteps_B = timestep.reshape(-1).expand(sample.shape[0])
        time_BT = self.time_embedding(self._sinusoid(timesteps_B, self.config.block_out_channels[0]).to(sample.dtype))
        if self.add_embedding is None:
            return time_BT
        if added is None or not {"text_embeds", "time_ids"} <= added.keys():
            raise ValueError("This U-Net needs added_cond_kwargs with 'text_embeds' [B, P] and 'time_ids' [B, 6].")
        assert self.config.addition_time_embed_dim is not None
        ids = self._sinusoid(added["time_ids"].flatten(), self.config.addition_time_embed_dim)
        ids_BT = ids.reshape(sample.shape[0], -1)
        return time_BT + self.add_embedding(torch.cat([added["text_embeds"], ids_BT], dim=-1).to(sample.dtype))

    def _sinusoid(self, values_B: torch.Tensor, dim: int) -> torch.Tensor:
        config = self.config
        return timestep_embedding(values_B, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)
