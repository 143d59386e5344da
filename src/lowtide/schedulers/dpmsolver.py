"""DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095), multistep, as an ODE or as an SDE.

They are exponential integrators, of orders 1 to 3: DPM-Solver of the noise predicted, DPM-Solver++ of the clean sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import StepOutput, Timestep
from lowtide.schedulers.fresh_noise import Generators, draw_noise
from lowtide.schedulers.multistep import MultistepConfig, MultistepScheduler, Prediction
from lowtide.schedulers.noise_schedule import NoiseLevel
from lowtide.schedulers.scheduler_entries import unsupported
from lowtide.schedulers.sigmas import SigmaConfig

SHORT_RUN = 15  # steps below which `lower_order_final` acts
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepConfig(MultistepConfig):
    """`solver_order` 2 is DPM-Solver++(2M); `lambda_min_clipped` cuts off the noisiest timesteps (log α/σ below it).

    An `algorithm_type` with "sde" draws fresh noise at each step; one with "++" integrates the clean sample, and the
    others, which cannot end at σ = 0, the noise. Of "sde-dpmsolver++" take order 2: the third is that of published
    samplers, whose samples spread ever wider with more steps. `use_lu_lambdas` spaces the steps evenly in log α/σ, by
    arXiv 2206.00927. With `variance_type` the model's output has variances behind its channels, which are left out.
    """

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    use_lu_lambdas: bool | None = False
    variance_type: str | None = None

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MultistepConfig.ALLOWED,
        "algorithm_type": ALGORITHMS,
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None, "learned", "learned_range"),
    }
    FOREIGN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "solver_type": ("bh1", "bh2", "logrho"),
        "algorithm_type": ("deis",),
    }
    SPACINGS: ClassVar[tuple[str, ...]] = (*SigmaConfig.SPACINGS, "use_lu_lambdas", "use_flow_sigmas")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.integrates_noise and self.final_sigmas_type == "zero":
            raise ValueError(
                f"DPMSolverMultistep: algorithm_type={self.algorithm_type!r} cannot end at sigma 0. "
                f"Use final_sigmas_type='sigma_min', or algorithm_type='{self.algorithm_type}++'."
            )
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise unsupported(self, "solver_order", "1 or 2 where algorithm_type='sde-dpmsolver'")

    @property
    def integrates_noise(self) -> bool:
        """Whether it is DPM-Solver, not DPM-Solver++."""
        return not self.algorithm_type.endswith("++")


class Stretch(NamedTuple):
    """The scalars of a step over h = λ_target - λ_now, whose first order is kept x - scale (exp(hh) - 1) m + std z."""

    kept: Tensor
    scale: Tensor
    hh: Tensor
    std: Tensor | None  # of the fresh noise z, which an ODE has none of


def dpm_stretch(algorithm: str, now: NoiseLevel, target: NoiseLevel) -> Stretch:
    """A step of DPM-Solver (arXiv 2206.00927), of DPM-Solver++ ("++") or of either's SDE ("sde"; arXiv 2211.01095).

    A `target` that is noisier than `now`, as the last one may be, takes no fresh noise.
    """
    h = target.lam - now.lam
    if algorithm == "dpmsolver++":
        return Stretch(target.sigma / now.sigma, target.alpha, -h, None)
    if algorithm == "dpmsolver":
        return Stretch(target.alpha / now.alpha, target.sigma, h, None)
    if algorithm == "sde-dpmsolver++":
        std = target.sigma * torch.sqrt((1.0 - torch.exp(-2.0 * h)).clamp(min=0))
        return Stretch(target.sigma / now.sigma * torch.exp(-h), target.alpha, -2.0 * h, std)
    assert algorithm == "sde-dpmsolver", algorithm
    std = target.sigma * torch.sqrt((torch.exp(2.0 * h) - 1.0).clamp(min=0))
    return Stretch(target.alpha / now.alpha, 2.0 * target.sigma, h, std)


def dpm_slopes(target: NoiseLevel, past: Sequence[Prediction]) -> list[Tensor]:
    """The first derivative of two predictions, and of three the first and half the second, over the step to `target`.

    In units of h = λ_target - λ_now; the newest prediction is last.
    """
    now, before = past[-1], past[-2]
    h = target.lam - now.level.lam
    r0 = (now.level.lam - before.level.lam) / h
    newer = (1.0 / r0) * (now.value - before.value)
    if len(past) == 2:
        return [newer]
    oldest = past[-3]
    r1 = (before.level.lam - oldest.level.lam) / h
    older = (1.0 / r1) * (before.value - oldest.value)
    return [newer + (r0 / (r0 + r1)) * (newer - older), (1.0 / (r0 + r1)) * (newer - older)]


def dpm_step(
    sample: Tensor,
    target: NoiseLevel,
    past: Sequence[Prediction],
    algorithm: str,
    solver_type: str,
    fresh: Tensor | None,
) -> Tensor:
    """One step of as high an order as there are predictions in `past`, 1 to 3, the newest last (arXiv 2211.01095).

    Of second order "midpoint" is the paper's way (Algorithm 2), "heun" weights the slope by its exact integral. The
    third order is the multistep form of DPM-Solver-3 (arXiv 2206.00927). `fresh` is standard normal noise, for an SDE.
    """
    now = past[-1]
    kept, scale, hh, std = dpm_stretch(algorithm, now.level, target)
    growth = torch.exp(hh) - 1.0
    moved = kept * sample - (scale * growth) * now.value
    if len(past) > 1:
        # The slopes' integrals, but for the second one's of an SDE: there, too, 1/2 should be taken away. We add it
        # for the same pictures as published samplers.
        half = -0.5 if std is None else 0.5
        weights = [growth / hh - 1.0, (growth - hh) / hh**2 + half]
        if len(past) == 2 and solver_type == "midpoint":
            weights = [0.5 * growth]
        for weight, slope in zip(weights, dpm_slopes(target, past), strict=False):
            moved = moved - (scale * weight) * slope
    if std is None:
        return moved
    assert fresh is not None
    return moved + std * fresh


class DPMSolverMultistepScheduler(MultistepScheduler[DPMSolverMultistepConfig]):
    """DPM-Solver and DPM-Solver++; steps must be taken in the order of `timesteps`."""

    config_class = DPMSolverMultistepConfig

    def __init__(self, config: DPMSolverMultistepConfig | None = None, **entries: Any) -> None:
        super().__init__(self._configured(config, entries))
        self._past: tuple[Prediction, ...] = ()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the timesteps (fewer than asked for where `lambda_min_clipped` cuts a "trailing" schedule).

        Or have those told. `mu` says how a flow's sigmas are shifted, in place of `flow_shift`, for this run.
        Raises `ValueError` if they do not fit the training schedule, and for `mu` without `use_dynamic_shifting`.
        """
        c, shift = self.config, self._shift(mu)
        if timesteps is not None:
            places = self._places_told(timesteps, num_inference_steps)
            sigmas = self._sigmas_at(places)
        elif c.use_flow_sigmas:
            num_steps = noise_schedule.check_num_steps(num_inference_steps, c.num_train_timesteps)
            sigmas = noise_schedule.shift_flow(self._even_flow(num_steps), shift)
            places = sigmas * c.num_train_timesteps
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
            whole = c.spacing in ("use_karras_sigmas", "use_lu_lambdas") and c.beta_schedule != "squaredcos_cap_v2"
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
        """From `sample` at `timestep` to the next timestep, in float32.

        An SDE takes `variance_noise`, or noise drawn from `generator`; else they have no effect, and `eta` never has.
        Raises `ValueError` before `set_timesteps` and after the last step.
        """
        place, c = self._enter(timestep), self.config
        level, target = self._level(self.sigmas[place]), self._level(self.sigmas[place + 1])
        if c.variance_type is not None:
            model_output = model_output[:, : sample.shape[1]]
        value = self._predicted(model_output, sample, level)
        past = (*self._past, Prediction(level, value))[-c.solver_order :]
        fresh = self._fresh(value, generator, variance_noise) if c.algorithm_type.startswith("sde") else None
        used = past[-self._order(place, len(past)) :]
        prev_sample = dpm_step(sample.float(), target, used, c.algorithm_type, c.solver_type, fresh)
        self._step_index = place + 1
        self._past = past if self._step_index < len(self.timesteps) else ()
        return StepOutput(prev_sample.to(value.dtype), None if c.integrates_noise else value)

    def _fresh(self, value: Tensor, generator: Generators, variance_noise: Tensor | None) -> Tensor:
        if variance_noise is not None:
            return variance_noise.to(value.device, torch.float32)
        return draw_noise(value.shape, generator=generator, device=value.device, dtype=torch.float32)

    def _even_flow(self, num_steps: int) -> noise_schedule.FloatArray:
        """The sigmas of a flow before they are shifted: evenly from one training timestep below 1, towards 0."""
        return 1 - np.linspace(1, 1 / self.config.num_train_timesteps, num_steps + 1)[:0:-1]

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
