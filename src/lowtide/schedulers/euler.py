"""Euler's method on the probability-flow ODE (arXiv 2206.00364, Algorithm 1, with churn where a step asks for it)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import StepOutput, Timestep
from lowtide.schedulers.fresh_noise import Generators, draw_noise
from lowtide.schedulers.sigmas import SigmaConfig, SigmaScheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerDiscreteConfig(SigmaConfig):
    """`sigma_min` and `sigma_max` bound sigmas that are spaced.

    `interpolation_type` "log_linear" spaces them evenly in log σ, unless another entry does; the last step then ends at
    timestep 0. With `timestep_type` "continuous" a model of v-predictions is told sigmas instead of timesteps, see
    `continuous_timesteps`; of log-linear ones there is one more then.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaConfig.ALLOWED,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    }

    @property
    def tells_sigmas(self) -> bool:
        """Whether the model is told sigmas instead of timesteps."""
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"


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


def continuous_timesteps(sigmas: Tensor) -> Tensor:
    """What a model of continuous time is told instead of timesteps: log(σ)/4 (arXiv 2206.00364, Table 1)."""
    return 0.25 * sigmas.log()


class EulerDiscreteScheduler(SigmaScheduler[EulerDiscreteConfig]):
    """Euler's method on variance-exploding samples: the model's input is scaled, and `timesteps` may be fractions."""

    config_class = EulerDiscreteConfig

    def __init__(self, config: EulerDiscreteConfig | None = None, **entries: Any) -> None:
        super().__init__(self._configured(config, entries))
        told = self.config.tells_sigmas
        self.timesteps = continuous_timesteps(self.sigmas[:-1]) if told else self.timesteps.float()

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that the first step expects."""
        largest = self.sigmas.max()
        return float(largest if self.config.timestep_spacing != "leading" else (largest**2 + 1) ** 0.5)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay out `num_inference_steps` timesteps, or those told; `sigmas` are one more, the last of them the end.

        Raises `ValueError` if they do not fit the training schedule, and where not one of the three is given.
        """
        if sigmas is not None:
            return self._lay_out_sigmas(sigmas, num_inference_steps, timesteps, device)
        c, training = self.config, self._training_sigmas
        if timesteps is None:
            spaced = self._spaced(num_inference_steps)
        elif c.tells_sigmas:
            raise ValueError("timesteps are not possible with timestep_type='continuous': give sigmas.")
        else:
            spaced = self._places_told(timesteps, num_inference_steps)
        levels = self._sigmas_at(spaced.astype(np.float32))
        if c.interpolation_type == "log_linear":
            levels = noise_schedule.exponential_sigmas(float(training[-1]), float(training[0]), len(spaced) + 1)
        high = float(levels[0]) if c.sigma_max is None else c.sigma_max
        low = float(levels[-1]) if c.sigma_min is None else c.sigma_min
        spread = self._spread_sigmas(high, low, len(spaced))
        if spread is not None:
            levels, spaced = spread, noise_schedule.timesteps_of_sigmas(spread, training)
        last = float(training[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._lay_out(torch.as_tensor(spaced, dtype=torch.float32, device=device), levels, last)
        return None

    def _lay_out_sigmas(
        self,
        sigmas: Sequence[float],
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        device: torch.device | str | None,
    ) -> None:
        levels = np.asarray(sigmas, dtype=np.float32)
        if num_inference_steps is not None or timesteps is not None:
            raise ValueError("sigmas and num_inference_steps or timesteps are both given; give one of them.")
        if levels.ndim != 1 or len(levels) < 2 or not np.all(levels[:-1] > 0) or levels[-1] < 0:
            raise ValueError(
                f"sigmas={list(sigmas)!s:.200} are not possible: give two or more, all above 0 but the last."
            )
        spaced = noise_schedule.timesteps_of_sigmas(levels[:-1], self._training_sigmas)
        self._lay_out(torch.as_tensor(spaced, dtype=torch.float32, device=device), levels[:-1], float(levels[-1]))

    def _lay_out(self, timesteps: Tensor, sigmas: NDArray[np.floating], last: float) -> None:
        if self.config.tells_sigmas:
            timesteps = continuous_timesteps(torch.as_tensor(sigmas, dtype=torch.float32, device=timesteps.device))
        super()._lay_out(timesteps, sigmas, last)

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
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep, in float32; `eta` has no effect.

        With `s_churn` noise of `s_noise` times the usual deviation, drawn from `generator`, raises σ first where it is
        from `s_tmin` to `s_tmax` (arXiv 2206.00364, Algorithm 2).
        Raises `ValueError` before `set_timesteps` and after the last step.
        """
        place = self._enter(timestep)
        sigma, sigma_next = self.sigmas[place], self.sigmas[place + 1]
        sample = sample.float()
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            raised = sigma * (1 + min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1))
            device, dtype = model_output.device, model_output.dtype
            fresh = draw_noise(model_output.shape, generator=generator, device=device, dtype=dtype)
            sample, sigma = sample + s_noise * fresh * (raised**2 - sigma**2) ** 0.5, raised
        original = euler_original(self.config.prediction_type, model_output, sample, sigma)
        prev_sample = euler_step(sample, original, sigma, sigma_next)
        self._step_index = place + 1
        return StepOutput(prev_sample.to(model_output.dtype), original)

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`original` + σ_t `noise`; `timesteps` are some of `self.timesteps`, one per sample or one for all."""
        return original + self._sigmas_like(timesteps, original) * noise
