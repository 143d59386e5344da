"""DDIM (arXiv 2010.02502): one first-order step for each timestep, with as much fresh noise as `eta` says."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import (
    Generators,
    SchedulerBase,
    SchedulerConfig,
    StepOutput,
    Timestep,
    draw_noise,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMConfig(SchedulerConfig):
    """`set_alpha_to_one` ends at the clean sample instead of at timestep 0.

    `clip_sample` clamps x₀ to ± `clip_sample_range`; `thresholding` keeps it in bounds that its own values set
    instead (`noise_schedule.threshold`).
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool | None = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False


def ddim_std(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """The standard deviation of the fresh noise of one step (arXiv 2010.02502, Eq. 16)."""
    variance = ((1 - alpha_bar_prev) / (1 - alpha_bar)) * (1 - alpha_bar / alpha_bar_prev)
    return eta * variance**0.5


def ddim_step(original: Tensor, noise: Tensor, alpha_bar_prev: Tensor, std: Tensor) -> Tensor:
    """The mean of the next sample, from x₀ and ε predicted (arXiv 2010.02502, Eq. 12 without its random term)."""
    return alpha_bar_prev**0.5 * original + (1 - alpha_bar_prev - std**2) ** 0.5 * noise


class DDIMScheduler(SchedulerBase[DDIMConfig]):
    """DDIM. It remembers nothing from step to step, so steps may be taken in any order.

    A step depends on its arguments and on the number of steps last given to `set_timesteps`, which sets how far the
    step leads.
    """

    config_class = DDIMConfig

    def __init__(self, config: DDIMConfig | None = None, **entries: Any) -> None:
        config = self._configured(config, entries)
        super().__init__(config, zero_snr=config.rescale_betas_zero_snr)
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out `num_inference_steps` timesteps. Raises `ValueError` if they do not fit the training schedule."""
        spaced = self._spaced(num_inference_steps).round()
        self.num_inference_steps = int(num_inference_steps)
        self.timesteps = torch.as_tensor(spaced, dtype=torch.int64, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep; `eta` 0 is deterministic, 1 is as random as DDPM.

        `variance_noise` is used instead of noise drawn from `generator`. With `use_clipped_model_output` the noise
        predicted is what fits to x₀ after that was clipped or thresholded.
        Raises `ValueError` before `set_timesteps` and for `eta` outside 0…1.
        """
        if variance_noise is not None and generator is not None:
            raise ValueError("generator and variance_noise are both given; give one of them.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not possible: choose from 0 (deterministic) to 1 (as random as DDPM).")
        eta = float(eta)  # numpy's numbers would make arrays of tensors
        bar, bar_prev = self._alpha_bars(int(self.number_of(timestep)))
        alpha, sigma, kind = bar**0.5, (1 - bar) ** 0.5, self.config.prediction_type
        original = noise_schedule.predict_original(kind, model_output, sample, alpha, sigma)
        noise = noise_schedule.predict_noise(kind, model_output, sample, alpha, sigma)
        original = self._bounded(original)
        if use_clipped_model_output:
            noise = noise_schedule.predict_noise("sample", original, sample, alpha, sigma)
        std = ddim_std(bar, bar_prev, eta)
        prev_sample = ddim_step(original, noise, bar_prev, std)
        if eta > 0:
            if variance_noise is None:
                device, dtype = sample.device, model_output.dtype
                variance_noise = draw_noise(sample.shape, generator=generator, device=device, dtype=dtype)
            prev_sample = prev_sample + std * variance_noise
        return StepOutput(prev_sample, original)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction, √ᾱ_t `noise` - √(1-ᾱ_t) `sample` (arXiv 2202.00512, section 4)."""
        alpha, sigma = self._levels_like(timesteps, sample)
        return alpha * noise - sigma * sample

    def _bounded(self, original: Tensor) -> Tensor:
        c = self.config
        if c.thresholding:
            return noise_schedule.threshold(original, c.dynamic_thresholding_ratio, c.sample_max_value)
        return original.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else original

    def _alpha_bars(self, timestep: int) -> tuple[Tensor, Tensor]:
        previous = timestep - self.config.num_train_timesteps // self._num_inference_steps()
        bar = self.alphas_cumprod[timestep]
        noise_schedule.check_predicts(self.config.prediction_type, bar, timestep)
        return bar, self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
