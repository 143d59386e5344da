"""Train the autoencoder: 128x128 pictures to 16x16 latents of 4 channels, and back."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lowtide.models.model_outputs import AutoencoderKLOutput, DecoderOutput
from lowtide.models.vae import AutoencoderKL
from lowtide.models.vae_config import AutoencoderKLConfig
from training.loop import Schedule, train
from training.seascapes import sheet

CONFIG = AutoencoderKLConfig(
    block_out_channels=(32, 64, 128, 128),
    layers_per_block=1,
    norm_num_groups=16,
    sample_size=128,
    scaling_factor=1.0,
    force_upcast=False,
)
WEIGHTS = {"l1": 1.0, "l2": 4.0, "edges": 0.7, "kl": 2e-4}
"""The squared term gets small things' colours right early; the edges keep outlines crisp."""
CROP = 64
CROPPED_SHARE = 0.88
"""Share of the steps that see crops: cheap steps first, whole pictures (and their norm statistics) last."""


def train_autoencoder(
    pictures: np.ndarray, schedule: Schedule, batch: int, seed: int, device: torch.device, out: Path
) -> AutoencoderKL:
    """Train on uint8 pictures `[N, 128, 128, 3]`; checkpoints and sheets of reconstructions go to `out`."""
    torch.manual_seed(seed)
    model = AutoencoderKL(CONFIG).to(device).to(memory_format=torch.channels_last)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step))
        x = to_tensor(_batch(pictures, batch, rng, cropped=step < CROPPED_SHARE * schedule.steps), device)
        with torch.autocast(device.type, torch.bfloat16):
            encoded = model.encode(x)
            assert isinstance(encoded, AutoencoderKLOutput)
            posterior = encoded.latent_dist
            noise = torch.Generator(device).manual_seed(step)
            decoded = model.decode(posterior.sample(noise))
            assert isinstance(decoded, DecoderOutput)
        y = decoded.sample.float()
        terms = {"l1": F.l1_loss(y, x), "l2": F.mse_loss(y, x), "edges": edge_loss(y, x)}
        terms["kl"] = posterior.kl().float().mean() / posterior.mean[0].numel()
        return {
            "loss": sum((WEIGHTS[name] * term for name, term in terms.items()), torch.zeros((), device=device)),
            **terms,
        }

    def look(averaged: nn.Module, step: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            x = to_tensor(pictures[:16], device)
            y = averaged(x).sample.float()
        pairs = torch.stack([x, y], dim=1).flatten(0, 1)
        sheet(to_pixels(pairs), columns=8).save(out / f"autoencoder-{step}.png")
        print(f"  reconstruction {psnr(x, y):.2f} dB", flush=True)

    averaged = train(model, loss_of, schedule, out / "autoencoder.pt", look)
    assert isinstance(averaged, AutoencoderKL)
    return averaged.eval()


@torch.no_grad()
def encode_all(model: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the latents of all pictures, each fp32 `[N, 4, 16, 16]`."""
    means, stds = [], []
    for start in range(0, len(pictures), 64):
        with torch.autocast(device.type, torch.bfloat16):
            encoded = model.encode(to_tensor(pictures[start : start + 64], device))
        assert isinstance(encoded, AutoencoderKLOutput)
        means.append(encoded.latent_dist.mean.float().cpu())
        stds.append(encoded.latent_dist.std.float().cpu())
    return torch.cat(means), torch.cat(stds)


def _batch(pictures: np.ndarray, count: int, rng: np.random.Generator, cropped: bool) -> np.ndarray:
    """Draw `count` crops, or half as many whole pictures."""
    whole = pictures[np.sort(rng.integers(0, len(pictures), count if cropped else count // 2))]
    if not cropped:
        return whole
    corners = rng.integers(0, whole.shape[1] - CROP + 1, (count, 2))
    return np.stack([p[y : y + CROP, x : x + CROP] for p, (y, x) in zip(whole, corners, strict=True)])


def edge_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical steps between neighbouring pixels."""
    rows, columns = y.diff(dim=2) - x.diff(dim=2), y.diff(dim=3) - x.diff(dim=3)
    return rows.abs().mean() + columns.abs().mean()


def to_tensor(pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to `[B, 3, H, W]` in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """`[B, 3, H, W]` in [-1, 1] to uint8 `[B, H, W, 3]`."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(x, y)))
