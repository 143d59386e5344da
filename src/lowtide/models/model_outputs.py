"""What the models return: predictions, decoded pictures, and distributions over latents."""

from dataclasses import dataclass

import torch


@dataclass
class UNet2DConditionOutput:
    """The denoiser's prediction, `sample` `[B, out_channels, H, W]`."""

    sample: torch.Tensor


@dataclass
class Transformer3DModelOutput:
    """The video denoiser's prediction, `sample` `[B, F, out_channels, H, W]`."""

    sample: torch.Tensor


@dataclass
class DecoderOutput:
    """The decoded pictures `[B, 3, H, W]` or clips `[B, 3, F, H, W]` as `sample`, nominally in [-1, 1]."""

    sample: torch.Tensor


class DiagonalGaussianDistribution:
    """The encoder's posterior: an independent normal for each latent (Kingma & Welling 2014, app. B)."""

    def __init__(self, moments_B2CHW: torch.Tensor) -> None:
        self.mean, logvar = moments_B2CHW.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw `[B, C, H, W]`, with noise from the generator's device: a seed gives the same picture everywhere."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """The most likely latents, `[B, C, H, W]`."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """Divergence from the standard normal, summed over each latent, `[B]`; Kingma & Welling 2014, eq. 10."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


@dataclass
class AutoencoderKLOutput:
    """The encoded picture, as a distribution over latents."""

    latent_dist: DiagonalGaussianDistribution
