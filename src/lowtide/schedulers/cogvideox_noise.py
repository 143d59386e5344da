"""What CogVideoX's schedulers share (arXiv 2408.06072): a noise schedule whose signal-to-noise ratio is shifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import SchedulerBase, SchedulerConfig, shifted_alphas


@dataclasses.dataclass(frozen=True, kw_only=True)
class CogVideoXConfig(SchedulerConfig):
    """`snr_shift_scale` divides the signal-to-noise ratio of every timestep, before `rescale_betas_zero_snr` acts.

    `set_alpha_to_one` ends at the clean sample instead of at timestep 0. Samples are never clipped: the published
    schedulers have an entry `clip_sample`, but ignore it too.
    The noise levels do not depend on the scheduler's class: every class applies the shift, and a configuration that is
    taken over from a class without a shift has none. Only a file or a plain dict without the entry takes the published
    default.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0

    IDLE: ClassVar[Mapping[str, Any]] = {"clip_sample": True, "clip_sample_range": 1.0, "sample_max_value": 1.0}
    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SchedulerConfig.ALLOWED, "thresholding": (False, None)}

    @classmethod
    def from_scheduler(cls, other: SchedulerConfig) -> Self:
        """Take over the configuration of any scheduler, with its shift; without a shift it stays without one."""
        return dataclasses.replace(super().from_scheduler(other), snr_shift_scale=other.snr_shift)

    def carried(self) -> dict[str, Any]:
        """The entries that another class takes over; the shift is one of them, unless it is 1 and was not given."""
        entries = {**super().carried(), "snr_shift_scale": self.snr_shift_scale}
        if self.snr_shift_scale == 1 and "snr_shift_scale" not in self.given:
            del entries["snr_shift_scale"]
        return entries


CogVideoXConfigT = TypeVar("CogVideoXConfigT", bound=CogVideoXConfig)


class CogVideoXScheduler(SchedulerBase[CogVideoXConfigT]):
    """CogVideoX's timesteps and noise levels; `alphas_cumprod` is float64 where the schedule is "scaled_linear"."""

    def __init__(self, config: CogVideoXConfigT) -> None:
        super().__init__(config, alphas_cumprod=shifted_alphas(config, zero_snr=config.rescale_betas_zero_snr))
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out `num_inference_steps` timesteps. Raises `ValueError` if they do not fit the training schedule."""
        spaced = self._spaced(num_inference_steps).round()
        self.num_inference_steps = int(num_inference_steps)
        self.timesteps = torch.as_tensor(spaced, dtype=torch.int64, device=device)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction, √ᾱ_t `noise` - √(1-ᾱ_t) `sample` (arXiv 2202.00512, section 4)."""
        alpha, sigma = self._levels_like(timesteps, sample)
        return alpha * noise - sigma * sample

    def _target(self, timestep: int) -> int:
        """The timestep to which a step from `timestep` leads, a fixed gap below; if negative, the end of the run.

        Raises `ValueError` before `set_timesteps` and for a timestep outside the training schedule.
        """
        target = timestep - self.config.num_train_timesteps // self._num_inference_steps()
        last = self.config.num_train_timesteps - 1
        if not 0 <= timestep <= last:
            raise ValueError(
                f"Timestep {timestep} is not possible: the model was trained with 0…{last}. "
                f"Take those of {type(self).__name__}.timesteps."
            )
        return target

    def _original(self, model_output: Tensor, sample: Tensor, timestep: int) -> Tensor:
        """The clean sample that the model predicts. Raises `ValueError` where it predicts noise from pure noise."""
        bar, kind = self._alpha_bar(timestep), self.config.prediction_type
        noise_schedule.check_predicts(kind, bar, timestep)
        return noise_schedule.predict_original(kind, model_output, sample, bar**0.5, (1 - bar) ** 0.5)

    def _alpha_bar(self, timestep: int) -> Tensor:
        """ᾱ at `timestep`, a scalar on the CPU."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod
