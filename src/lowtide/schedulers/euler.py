"""Euler's method on the probability-flow ODE (arXiv 2206.00364, Algorithm 1 without churn)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import Generators, StepOutput, Timestep
from lowtide.schedulers.sigmas import SigmaConfig, SigmaScheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerDiscreteConfig(SigmaConfig):
    """`sigma_min` and `sigma_max` bound the Karras sigmas, where given."""

    sigma_min: float | None = None
    sigma_max: float | None = None

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaConfig.ALLOWED,
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
    }


def euler_original(kind: str, model_output: Tensor, sample: Tensor, sigma: Tensor) -> Tensor:
    """x₀ from a variance-exploding `sample` and what the model predicts (arXiv 2206.00364, Table 1)."""
    if kind == "sample":
        return model_output
    if kind == "v_prediction":
        return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
    return sample - sigma * model_output


def euler_step(sample: Tensor, original: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Follow dx/dσ = (x - x₀)/σ from `sigma` to `sigma_next` (arXiv 2206.00364, Eq. 1 and 3)."""
    return sample + (sample - original) / sigma * (sigma_next - sigma)


class EulerDiscreteScheduler(SigmaScheduler[EulerDiscreteConfig]):
    """Euler's method on variance-exploding samples: the model's input is scaled, and `timesteps` may be fractions."""

    config_class = EulerDiscreteConfig

    def __init__(self, config: EulerDiscreteConfig | None = None) -> None:
        config = config or EulerDiscreteConfig()
        super().__init__(config, zero_snr=config.rescale_betas_zero_snr)
        self.timesteps = self.timesteps.float()

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that the first step expects."""
        largest = self.sigmas.max()
        return float(largest if self.config.timestep_spacing != "leading" else (largest**2 + 1) ** 0.5)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out `num_inference_steps` timesteps. Raises `ValueError` if they do not fit the training schedule."""
        c = self.config
        timesteps = self._spaced(num_inference_steps).astype(np.float32)
        sigmas = self._sigmas_at(timesteps)
        if c.use_karras_sigmas:
            high = float(sigmas[0]) if c.sigma_max is None else c.sigma_max
            low = float(sigmas[-1]) if c.sigma_min is None else c.sigma_min
            sigmas = noise_schedule.karras_sigmas(high, low, num_inference_steps)
            timesteps = noise_schedule.timesteps_of_sigmas(sigmas, self._training_sigmas).astype(np.float32)
        last = float(self._training_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._lay_out(torch.as_tensor(timesteps, device=device), sigmas, last)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """`sample` / √(σ²+1), the variance-preserving input of the model."""
        sigma = self.sigmas[self._enter(timestep)]
        return sample / (sigma**2 + 1) ** 0.5

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep, in float32; `eta` and `generator` have no effect.

        Raises `ValueError` before `set_timesteps` and after the last step.
        """
        place = self._enter(timestep)
        sigma, sigma_next = self.sigmas[place], self.sigmas[place + 1]
        sample = sample.float()
        original = euler_original(self.config.prediction_type, model_output, sample, sigma)
        prev_sample = euler_step(sample, original, sigma, sigma_next)
        self._place = place + 1
        return StepOutput(prev_sample.to(model_output.dtype), original)

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`original` + σ_t `noise`; `timesteps` are some of `self.timesteps`, one per sample or one for all."""
        return original + self._sigmas_like(timesteps, original) * noise
