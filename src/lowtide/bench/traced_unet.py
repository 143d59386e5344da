"""A U-Net traced by `torch.jit.trace`, which takes the place of a pipeline's U-Net."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowtide.bench.context import Context

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class TracedOutput:
    """What a pipeline reads of a U-Net's output."""

    sample: torch.Tensor


class TracedUNet(nn.Module):
    """A U-Net traced with `inputs`, to be assigned to `pipe.unet`; it takes inputs of the same shapes alone."""

    def __init__(self, unet: Any, inputs: Inputs) -> None:
        super().__init__()
        self.in_channels = unet.config.in_channels
        self.device = unet.device
        unet.forward = functools.partial(unet.forward, return_dict=False)  # a trace cannot return our outputs
        with torch.no_grad():
            self.traced: Any = torch.jit.trace(unet, inputs)

    def forward(
        self, latent_model_input: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> TracedOutput:
        """Denoise once: latents `[B, in_channels, H, W]`, the timestep `[]`, text `[B, S, C]`."""
        return TracedOutput(sample=self.traced(latent_model_input, t, encoder_hidden_states)[0])


def example_inputs(pipe: Any, context: Context) -> Inputs:
    """Inputs such as the pipeline gives in a guided call: each picture twice, a timestep, embedded text."""
    config, device = pipe.unet.config, context.device
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    shape = (2 * context.batch, config.in_channels, context.height // scale, context.width // scale)
    sample = torch.randn(shape, device=device, dtype=context.dtype)
    text_shape = (2 * context.batch, pipe.tokenizer.model_max_length, config.cross_attention_dim)
    text = torch.randn(text_shape, device=device, dtype=context.dtype)
    return sample, torch.tensor(481, device=device), text
