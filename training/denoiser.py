"""Train the denoiser and the text encoder together on the latents of the finished autoencoder."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from lowtide.models.model_outputs import DecoderOutput, UNet2DConditionOutput
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.unet_config import UNet2DConditionConfig
from lowtide.models.vae import AutoencoderKL
from lowtide.schedulers.noise_schedule import cumulative_alphas, training_betas
from training.loop import Schedule, train
from training.text import WIDTH

CONFIG = UNet2DConditionConfig(
    sample_size=16,
    block_out_channels=(64, 112, 160),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=WIDTH,
    norm_num_groups=16,
)
ALPHAS_CUMPROD = cumulative_alphas(training_betas("scaled_linear", 0.00085, 0.012, 1000))
EMPTY_SHARE = 0.1
"""Share of the captions replaced by the empty one, for classifier-free guidance (Ho & Salimans 2022)."""


@dataclass(frozen=True)
class Latents:
    """The encoded pictures: means and standard deviations `[N, 4, 16, 16]`, token ids `[N, tokens]`."""

    mean: torch.Tensor
    std: torch.Tensor
    ids: torch.Tensor
    empty_ids: torch.Tensor
    scaling_factor: float


class TextToLatents(nn.Module):
    """The text encoder and the denoiser as one module, so that one loop trains and averages both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict the velocity `[B, 4, 16, 16]`."""
        context = self.text_encoder(ids).last_hidden_state
        output = self.unet(noisy, timesteps, context)
        assert isinstance(output, UNet2DConditionOutput)
        return output.sample


def train_denoiser(
    model: TextToLatents,
    data: Latents,
    schedule: Schedule,
    batch: int,
    seed: int,
    checkpoint: Path,
    look: Callable[[nn.Module, int], None],
) -> TextToLatents:
    """Train with velocity prediction (Salimans & Ho 2022, app. D): v = α ε - σ x₀ at uniform times."""
    device = next(model.parameters()).device
    bars = ALPHAS_CUMPROD.to(device)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data.mean), (batch,), generator=draw)
        empty = torch.rand(batch, 1, generator=draw) < EMPTY_SHARE
        ids = torch.where(empty, data.empty_ids, data.ids[rows]).to(device)
        posterior = torch.randn(batch, *data.mean.shape[1:], generator=draw)
        x0 = ((data.mean[rows] + data.std[rows] * posterior) * data.scaling_factor).to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        even = (torch.arange(batch) + torch.rand(1, generator=draw)) / batch % 1.0
        timesteps = (even * len(bars)).long().to(device)
        alpha, sigma = (part[:, None, None, None].sqrt() for part in (bars[timesteps], 1 - bars[timesteps]))
        with torch.autocast(device.type, torch.bfloat16), attention_kernel(device):
            predicted = model(alpha * x0 + sigma * noise, timesteps, ids)
        return {"loss": F.mse_loss(predicted.float(), alpha * noise - sigma * x0)}

    averaged = train(model, loss_of, schedule, checkpoint, look)
    assert isinstance(averaged, TextToLatents)
    return averaged.eval()


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """The math kernel on a CPU: for heads this small, the backward pass of the fused kernel is slower there."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def sample_pictures(
    model: TextToLatents,
    vae: AutoencoderKL,
    ids: torch.Tensor,
    empty_ids: torch.Tensor,
    scaling_factor: float,
    steps: int = 25,
    guidance: float = 4.0,
) -> torch.Tensor:
    """Pictures `[B, 3, 128, 128]` of captions `ids` by DDIM (Song et al. 2021), to look at while training."""
    device = next(model.parameters()).device
    ids = torch.cat([empty_ids.expand_as(ids), ids]).to(device)
    x = torch.randn(len(ids) // 2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    edges = [round(len(ALPHAS_CUMPROD) * (1 - i / steps)) - 1 for i in range(steps + 1)]
    with torch.autocast(device.type, torch.bfloat16):
        for now, after in pairwise(edges):
            v_empty, v_text = model(torch.cat([x, x]), torch.tensor(now, device=device), ids).float().chunk(2)
            v = v_empty + guidance * (v_text - v_empty)
            alpha, sigma = _alpha_sigma(now)
            x0, noise = alpha * x - sigma * v, alpha * v + sigma * x
            alpha, sigma = _alpha_sigma(after)
            x = alpha * x0 + sigma * noise
        decoded = vae.decode(x / scaling_factor)
    assert isinstance(decoded, DecoderOutput)
    return decoded.sample.float()


def _alpha_sigma(timestep: int) -> tuple[float, float]:
    bar = float(ALPHAS_CUMPROD[timestep]) if timestep >= 0 else 1.0
    return bar**0.5, (1 - bar) ** 0.5
