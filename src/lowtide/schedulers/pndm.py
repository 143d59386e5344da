"""PNDM (arXiv 2202.09778): pseudo linear multi-step, which may begin with pseudo Runge-Kutta steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import Generators, SchedulerBase, SchedulerConfig, StepOutput, Timestep

RUNGE_KUTTA_STEPS = 3  # the first steps of a run, with four model calls each
RUNGE_KUTTA_CALLS = 4 * RUNGE_KUTTA_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDMConfig(SchedulerConfig):
    """`skip_prk_steps` begins with a multi-step of low order (as Stable Diffusion does) instead of Runge-Kutta."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerConfig.ALLOWED,
        "prediction_type": ("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": (False, None),
    }


def pndm_transfer(sample: Tensor, noise: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Move `sample` from level ᾱ to level ᾱ_prev along the predicted `noise` (arXiv 2202.09778, Eq. 9)."""
    scale = (alpha_bar_prev / alpha_bar) ** 0.5
    divisor = alpha_bar * (1 - alpha_bar_prev) ** 0.5 + (alpha_bar * (1 - alpha_bar) * alpha_bar_prev) ** 0.5
    return scale * sample - (alpha_bar_prev - alpha_bar) * noise / divisor


def adams_bashforth(noises: Sequence[Tensor]) -> Tensor:
    """The noise of a linear multi-step over 1 to 4 predictions, newest last (arXiv 2202.09778, Eq. 12)."""
    if len(noises) == 1:
        return noises[-1]
    if len(noises) == 2:
        return (3 * noises[-1] - noises[-2]) / 2
    if len(noises) == 3:
        return (23 * noises[-1] - 16 * noises[-2] + 5 * noises[-3]) / 12
    return (1 / 24) * (55 * noises[-1] - 59 * noises[-2] + 37 * noises[-3] - 9 * noises[-4])


class PNDMScheduler(SchedulerBase[PNDMConfig]):
    """PNDM; steps must be taken in the order of `timesteps`.

    With `skip_prk_steps` the second timestep comes twice, so n steps take n + 1 model calls (but 1 for n = 1);
    without it, they take n + 9, and n is at least 4.
    """

    config_class = PNDMConfig

    def __init__(self, config: PNDMConfig | None = None, **entries: Any) -> None:
        config = self._configured(config, entries)
        super().__init__(config)
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]
        self._forget()

    def _forget(self) -> None:
        self._calls = 0
        self._noises: list[Tensor] = []
        self._start: Tensor | None = None  # the sample with which the current Runge-Kutta step or the first step began
        self._top = 0  # the timestep of that start
        self._slope: Tensor | None = None  # the weighted sum of the current Runge-Kutta step

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out the timesteps of all model calls. Raises `ValueError` if they do not fit the training schedule."""
        c = self.config
        least = 1 if c.skip_prk_steps else RUNGE_KUTTA_STEPS + 1
        spaced = self._spaced(num_inference_steps, least).round()
        self.num_inference_steps = int(num_inference_steps)
        if c.skip_prk_steps:
            calls = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])
        else:
            calls = np.concatenate([self._runge_kutta_timesteps(spaced), spaced[RUNGE_KUTTA_STEPS:]])
        self.timesteps = torch.as_tensor(calls, dtype=torch.int64, device=device)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to what the next model call needs; `eta` and `generator` have no effect.

        Raises `ValueError` before `set_timesteps`.
        """
        at = int(self.number_of(timestep))
        gap = self.config.num_train_timesteps // self._num_inference_steps()
        if self._calls < RUNGE_KUTTA_CALLS and not self.config.skip_prk_steps:
            prev_sample = self._runge_kutta(model_output, at, sample, gap)
        else:
            prev_sample = self._multistep(model_output, at, sample, gap)
        self._calls += 1
        if self._calls == len(self.timesteps):
            self._forget()
        return StepOutput(prev_sample)

    def _runge_kutta_timesteps(self, spaced: np.ndarray) -> np.ndarray:
        half = self.config.num_train_timesteps // len(spaced) // 2
        tops, bottoms = spaced[:RUNGE_KUTTA_STEPS], spaced[1 : RUNGE_KUTTA_STEPS + 1]
        # Four slopes a step: at its top, twice half way (measured from the bottom), and at its bottom.
        return np.stack([tops, bottoms + half, bottoms + half, bottoms], axis=1).flatten()

    def _runge_kutta(self, model_output: Tensor, timestep: int, sample: Tensor, gap: int) -> Tensor:
        """One of the four calls of a pseudo Runge-Kutta step (arXiv 2202.09778, Eq. 13)."""
        stage = self._calls % 4
        if stage == 0:
            self._start, self._top, self._slope = sample, timestep, 1 / 6 * model_output
            self._noises.append(model_output)
        assert self._start is not None
        assert self._slope is not None
        if stage in (1, 2):
            self._slope = self._slope + 1 / 3 * model_output
        noise = self._slope + 1 / 6 * model_output if stage == 3 else model_output
        target = timestep if stage % 2 else timestep - gap // 2
        return self._transfer(self._start, noise, self._top, target)

    def _multistep(self, model_output: Tensor, timestep: int, sample: Tensor, gap: int) -> Tensor:
        if self._calls == 1:  # the first step again, from its start, with the mean of both ends' predictions
            assert self._start is not None
            noise, start = (model_output + self._noises[-1]) / 2, self._start
            self._start = None
            return self._transfer(start, noise, timestep + gap, timestep)
        if self._calls == 0:
            self._start = sample
        self._noises = [*self._noises[-3:], model_output]
        return self._transfer(sample, adams_bashforth(self._noises), timestep, timestep - gap)

    def _transfer(self, sample: Tensor, noise: Tensor, timestep: int, target: int) -> Tensor:
        bar = self.alphas_cumprod[timestep]
        bar_prev = self.alphas_cumprod[target] if target >= 0 else self.final_alpha_cumprod
        # A v-prediction becomes noise only here, after predictions of several timesteps were combined. This is not the
        # order of the paper, but the order that published pictures were made with.
        kind = self.config.prediction_type
        noise = noise_schedule.predict_noise(kind, noise, sample, bar**0.5, (1 - bar) ** 0.5)
        return pndm_transfer(sample, noise, bar, bar_prev)
