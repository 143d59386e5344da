"""DPM-Solver++ (arXiv 2211.01095), multistep, orders 1 to 3: exponential integrators of the clean-sample prediction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import Generators, StepOutput, Timestep
from lowtide.schedulers.noise_schedule import NoiseLevel, noise_level
from lowtide.schedulers.sigmas import OFF, MultistepConfig, SigmaScheduler

SHORT_RUN = 15  # steps below which `lower_order_final` acts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepConfig(MultistepConfig):
    """`solver_order` 2 is DPM-Solver++(2M); `lambda_min_clipped` cuts off the noisiest timesteps (log α/σ below it)."""

    solver_type: str = "midpoint"
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MultistepConfig.ALLOWED,
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "heun"),
        "use_lu_lambdas": OFF,
        "variance_type": (None,),
    }
    FOREIGN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "solver_type": ("bh1", "bh2", "logrho"),
        "algorithm_type": ("deis",),
    }


class Prediction(NamedTuple):
    """A clean-sample prediction and the noise level at which it was made."""

    level: NoiseLevel
    original: Tensor


def dpm_first_order(sample: Tensor, target: NoiseLevel, now: Prediction) -> Tensor:
    """One step of DPM-Solver++(1), which is DDIM (arXiv 2211.01095, section 4)."""
    h = target.lam - now.level.lam
    return (target.sigma / now.level.sigma) * sample - (target.alpha * (torch.exp(-h) - 1.0)) * now.original


def dpm_second_order(sample: Tensor, target: NoiseLevel, past: Sequence[Prediction], solver_type: str) -> Tensor:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2); `past` has the newest prediction last.

    "midpoint" is the paper's way; "heun" weights the difference by its exact integral.
    """
    now, before = past[-1], past[-2]
    h = target.lam - now.level.lam
    ratio = (now.level.lam - before.level.lam) / h
    difference = (1.0 / ratio) * (now.original - before.original)
    weight = target.alpha * (torch.exp(-h) - 1.0)
    base = (target.sigma / now.level.sigma) * sample - weight * now.original
    if solver_type == "heun":
        return base + (target.alpha * ((torch.exp(-h) - 1.0) / h + 1.0)) * difference
    return base - 0.5 * weight * difference


def dpm_third_order(sample: Tensor, target: NoiseLevel, past: Sequence[Prediction]) -> Tensor:
    """One step of DPM-Solver++(3M), the multistep form of DPM-Solver-3 (arXiv 2206.00927); newest last in `past`."""
    now, before, oldest = past[-1], past[-2], past[-3]
    h = target.lam - now.level.lam
    r0, r1 = (now.level.lam - before.level.lam) / h, (before.level.lam - oldest.level.lam) / h
    newer = (1.0 / r0) * (now.original - before.original)
    older = (1.0 / r1) * (before.original - oldest.original)
    first = newer + (r0 / (r0 + r1)) * (newer - older)
    second = (1.0 / (r0 + r1)) * (newer - older)
    shrink = torch.exp(-h) - 1.0
    return (
        (target.sigma / now.level.sigma) * sample
        - (target.alpha * shrink) * now.original
        + (target.alpha * (shrink / h + 1.0)) * first
        - (target.alpha * ((shrink + h) / h**2 - 0.5)) * second
    )


class DPMSolverMultistepScheduler(SigmaScheduler[DPMSolverMultistepConfig]):
    """DPM-Solver++; steps must be taken in the order of `timesteps`."""

    config_class = DPMSolverMultistepConfig

    def __init__(self, config: DPMSolverMultistepConfig | None = None, **entries: Any) -> None:
        config = self._configured(config, entries)
        super().__init__(config, zero_snr=config.rescale_betas_zero_snr)
        self._past: tuple[Prediction, ...] = ()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the timesteps (fewer than asked for where `lambda_min_clipped` cuts a "trailing" schedule).

        Or have those told. Raises `ValueError` if they do not fit the training schedule.
        """
        c = self.config
        if timesteps is not None:
            self._check_told(timesteps, num_inference_steps)
            places = np.asarray(timesteps, dtype=np.float64)
            sigmas = self._sigmas_at(places)
        else:
            places, sigmas = self._spaced_out(num_inference_steps)
        last = float(self._training_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._lay_out(torch.as_tensor(places, dtype=torch.int64, device=device), sigmas, last)
        self._past = ()

    def _spaced_out(self, num_steps: int | None) -> tuple[noise_schedule.FloatArray, noise_schedule.FloatArray]:
        """Timesteps and their sigmas, as the configuration spaces them."""
        c, training = self.config, self._training_sigmas
        num_steps = noise_schedule.check_num_steps(num_steps, c.num_train_timesteps)
        sigmas = self._spread_sigmas(float(training[-1]), float(training[0]), num_steps)
        if sigmas is not None:
            timesteps = noise_schedule.timesteps_of_sigmas(sigmas, training)
            whole = c.use_karras_sigmas and c.beta_schedule != "squaredcos_cap_v2"
            return timesteps.round() if whole else timesteps, sigmas
        timesteps = noise_schedule.solver_timesteps(
            c.timestep_spacing, num_steps, c.num_train_timesteps, c.steps_offset, self._usable_timesteps()
        )
        noise_schedule.check_timesteps(timesteps, c.num_train_timesteps, c.timestep_spacing)
        return timesteps, self._sigmas_at(timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep, in float32; the arguments after `sample` have no effect.

        Raises `ValueError` before `set_timesteps` and after the last step.
        """
        place = self._enter(timestep)
        level, target = noise_level(self.sigmas[place]), noise_level(self.sigmas[place + 1])
        kind = self.config.prediction_type
        original = noise_schedule.predict_original(kind, model_output, sample, level.alpha, level.sigma)
        past = (*self._past, Prediction(level, original))[-self.config.solver_order :]
        prev_sample = self._solve(sample.float(), target, past, self._order(place, len(past)))
        self._step_index = place + 1
        self._past = past if self._step_index < len(self.timesteps) else ()
        return StepOutput(prev_sample.to(original.dtype), original)

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α_t `original` + σ_t `noise`; `timesteps` are some of `self.timesteps`, one per sample or one for all."""
        return self._noised(original, noise, timesteps)

    def _solve(self, sample: Tensor, target: NoiseLevel, past: Sequence[Prediction], order: int) -> Tensor:
        if order == 1:
            return dpm_first_order(sample, target, past[-1])
        if order == 2:
            return dpm_second_order(sample, target, past, self.config.solver_type)
        return dpm_third_order(sample, target, past)

    def _order(self, place: int, predictions: int) -> int:
        """The order of the step at `place`: at most the number of predictions, and lower in the last steps."""
        c, left = self.config, len(self.timesteps) - place
        short = c.lower_order_final and len(self.timesteps) < SHORT_RUN
        if left == 1 and (short or c.euler_at_final or self._without_span(place)):
            return 1
        return min(predictions, 2) if left == 2 and short else predictions

    def _usable_timesteps(self) -> int:
        """The number of training timesteps with log α/σ of at least `lambda_min_clipped`."""
        lam = torch.log(self.alphas_cumprod.sqrt()) - torch.log((1 - self.alphas_cumprod).sqrt())
        return len(lam) - int(torch.searchsorted(lam.flip(0), self.config.lambda_min_clipped))
