"""UniPC (arXiv 2302.04867): a multistep predictor (UniP) whose result the next model call corrects (UniC)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import StepOutput, Timestep
from lowtide.schedulers.fresh_noise import Generators
from lowtide.schedulers.multistep import MultistepConfig, MultistepScheduler, Prediction
from lowtide.schedulers.noise_schedule import FloatArray, NoiseLevel
from lowtide.schedulers.scheduler_entries import are_all, check_apart, check_needs, unsupported

ALMOST = 1e-6  # the first σ of a flow is this much below 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPCMultistepConfig(MultistepConfig):
    """`solver_type` is the paper's B(h), h or exp(h)-1; `disable_corrector` lists the steps that are not corrected.

    `sigma_min` and `sigma_max` bound sigmas that are spaced. With `use_karras_sigmas` a flow's sigmas are σ/(1+σ) of
    Karras', and not shifted. `shift_terminal` is the last σ of a flow before the end.
    """

    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: tuple[int, ...] = ()
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MultistepConfig.ALLOWED,
        "solver_type": ("bh1", "bh2"),
        "solver_p": (None,),
    }
    FOREIGN: ClassVar[Mapping[str, tuple[str, ...]]] = {"solver_type": ("midpoint", "heun", "logrho")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_apart(self, "use_flow_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        check_apart(self, "use_karras_sigmas", "use_dynamic_shifting")
        check_apart(self, "use_karras_sigmas", "shift_terminal")
        check_needs(self, "shift_terminal", "use_flow_sigmas")
        check_needs(self, "thresholding", "predict_x0")
        if not are_all(self.disable_corrector, int):
            raise unsupported(self, "disable_corrector", "a list of whole numbers")
        if not self.predict_x0 and self.final_sigmas_type == "zero":
            raise ValueError(
                "UniPCMultistep: predict_x0=False cannot end at sigma 0. "
                "Use final_sigmas_type='sigma_min', or predict_x0=True."
            )

    @property
    def integrates_noise(self) -> bool:
        """Whether `predict_x0` is off."""
        return not self.predict_x0


class Stretch(NamedTuple):
    """The parts of a step over h = λ_target - λ_now that predictor and corrector share."""

    base: Tensor  # the first-order step
    scale: Tensor  # α B(h), or σ B(h) for noise prediction: the factor of all differences
    ratios: list[Tensor]  # (λ_i - λ_now) / h of the older predictions, newest first
    differences: list[Tensor]  # (m_i - m_now) / ratio_i
    hh: Tensor  # -h, or h for noise prediction
    b_h: Tensor


def unipc_stretch(
    sample: Tensor, target: NoiseLevel, past: Sequence[Prediction], solver_type: str, predict_x0: bool
) -> Stretch:
    """First-order step, B(h) and differences of the predictions `past` (newest last; arXiv 2302.04867, section 3)."""
    now, older = past[-1], past[-2::-1]
    h = target.lam - now.level.lam
    ratios = [(p.level.lam - now.level.lam) / h for p in older]
    differences = [(p.value - now.value) / ratio for p, ratio in zip(older, ratios, strict=True)]
    hh = -h if predict_x0 else h
    growth = torch.expm1(hh)
    b_h = hh if solver_type == "bh1" else growth
    if predict_x0:
        kept, factor = target.sigma / now.level.sigma, target.alpha
    else:
        kept, factor = target.alpha / now.level.alpha, target.sigma
    return Stretch(kept * sample - factor * growth * now.value, factor * b_h, ratios, differences, hh, b_h)


def unipc_weights(ratios: Sequence[Tensor], hh: Tensor, b_h: Tensor) -> Tensor:
    """The weights of the differences at `ratios`, for the highest order they allow (arXiv 2302.04867, Theorem 3.1).

    They solve R a = b with R_ki = ratio_i^(k-1) and b_k = k! h φ_(k+1)(h) / B(h), k from 1.
    """
    nodes = torch.stack(list(ratios))
    phi, factorial = torch.expm1(hh) / hh - 1, 1
    rows: list[Tensor] = []
    right: list[Tensor] = []
    for k in range(1, len(ratios) + 1):
        rows.append(nodes ** (k - 1))
        right.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return torch.linalg.solve(torch.stack(rows), torch.stack(right))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def unip_step(stretch: Stretch) -> Tensor:
    """The predictor UniP (arXiv 2302.04867, Algorithm 2); one difference alone has weight 1/2."""
    if not stretch.differences:
        return stretch.base
    if len(stretch.differences) == 1:
        return stretch.base - stretch.scale * (0.5 * stretch.differences[0])
    weights = unipc_weights(stretch.ratios, stretch.hh, stretch.b_h)
    return stretch.base - stretch.scale * _weighted(weights, stretch.differences)


def unic_step(stretch: Stretch, difference: Tensor) -> Tensor:
    """The corrector UniC (arXiv 2302.04867, Algorithm 1), which has the target's own prediction as one more node.

    `difference` is that prediction minus the newest of the past; without older differences its weight is 1/2.
    """
    if not stretch.differences:
        return stretch.base - stretch.scale * (0.5 * difference)
    weights = unipc_weights([*stretch.ratios, torch.ones(())], stretch.hh, stretch.b_h)
    older = _weighted(weights[:-1], stretch.differences)
    return stretch.base - stretch.scale * (older + weights[-1] * difference)


def _weighted(weights: Tensor, differences: Sequence[Tensor]) -> Tensor:
    total = weights[0] * differences[0]
    for weight, difference in zip(weights[1:], differences[1:], strict=True):
        total = total + weight * difference
    return total


class UniPCMultistepScheduler(MultistepScheduler[UniPCMultistepConfig]):
    """UniPC; steps must be taken in the order of `timesteps`."""

    config_class = UniPCMultistepConfig

    def __init__(self, config: UniPCMultistepConfig | None = None, **entries: Any) -> None:
        super().__init__(self._configured(config, entries))
        self._forget()

    def _forget(self) -> None:
        self._past: tuple[Prediction, ...] = ()
        self._last_sample: Tensor | None = None  # the sample with which the last predictor step began
        self._last_order = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out `num_inference_steps` timesteps, or those of a flow's `sigmas`, which are shifted like others.

        `mu` says how they are shifted, in place of `flow_shift`; with `use_dynamic_shifting` it must be given.
        Raises `ValueError` if they do not fit the training schedule, and for `sigmas` or `mu` where there is no flow.
        """
        c = self.config
        if c.use_flow_sigmas:
            levels = self._flow(num_inference_steps, sigmas, mu)
            timesteps, smallest = levels * c.num_train_timesteps, float(levels[-1])
        elif sigmas is not None or mu is not None:
            raise ValueError("sigmas and mu are possible only with use_flow_sigmas=True; leave them out.")
        else:
            timesteps, levels, smallest = self._spaced_out(num_inference_steps)
        last = smallest if c.final_sigmas_type == "sigma_min" else 0.0
        self._lay_out(torch.as_tensor(timesteps, dtype=torch.int64, device=device), levels, last)
        self._forget()

    def _spaced_out(self, num_steps: int | None) -> tuple[FloatArray, FloatArray, float]:
        """Timesteps and their sigmas, as the configuration spaces them, and the smallest sigma."""
        c, training = self.config, self._training_sigmas
        num_steps = noise_schedule.check_num_steps(num_steps, c.num_train_timesteps)
        levels = self._spread_between_bounds(num_steps)
        if levels is not None:
            timesteps = noise_schedule.timesteps_of_sigmas(levels, training)
            return timesteps.round() if c.use_karras_sigmas else timesteps, levels, float(levels[-1])
        timesteps = noise_schedule.solver_timesteps(
            c.timestep_spacing, num_steps, c.num_train_timesteps, c.steps_offset, c.num_train_timesteps
        )
        noise_schedule.check_timesteps(timesteps, c.num_train_timesteps, c.timestep_spacing)
        return timesteps, self._sigmas_at(timesteps), float(training[0])

    def _spread_between_bounds(self, num_steps: int) -> FloatArray | None:
        c, training = self.config, self._training_sigmas
        high = float(training[-1]) if c.sigma_max is None else c.sigma_max
        low = float(training[0]) if c.sigma_min is None else c.sigma_min
        return self._spread_sigmas(high, low, num_steps)

    def _flow(self, num_steps: int | None, told: Sequence[float] | None, mu: float | None) -> FloatArray:
        """A flow's sigmas: those told, or spaced out; the first is below 1, where log α/σ is infinite."""
        c, shift = self.config, self._shift(mu)
        if mu is None and c.use_dynamic_shifting:
            raise ValueError("use_dynamic_shifting=True needs mu: give it to set_timesteps, as in mu=1.15.")
        if told is not None:
            self._check_told("sigmas", num_steps)
            levels = np.asarray(told, dtype=np.float64)
            noise_schedule.check_flow_sigmas(levels)
        else:
            num_steps = noise_schedule.check_num_steps(num_steps, c.num_train_timesteps)
            spread = self._spread_between_bounds(num_steps)
            if spread is not None:
                return spread / (spread + 1)
            levels = np.linspace(1, 1 / c.num_train_timesteps, num_steps + 1)[:-1]
        levels = noise_schedule.shift_flow(levels, shift)
        if c.shift_terminal is not None:
            levels = noise_schedule.stretch_to_terminal(levels, c.shift_terminal)
        levels[0] -= ALMOST if levels[0] > 1 - ALMOST else 0
        return levels

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
        """Correct `sample` at `timestep`, then predict the next one; `eta` and `generator` have no effect.

        Raises `ValueError` before `set_timesteps` and after the last step.
        """
        place, c = self._enter(timestep), self.config
        level, target = self._level(self.sigmas[place]), self._level(self.sigmas[place + 1])
        value = self._predicted(model_output, sample, level)
        sample = self._corrected(sample, level, value, place)
        past = (*self._past, Prediction(level, value))[-c.solver_order :]
        order = self._order(place, len(past))
        stretch = unipc_stretch(sample, target, past[-order:], c.solver_type, c.predict_x0)
        prev_sample = unip_step(stretch)
        self._past, self._last_sample, self._last_order, self._step_index = past, sample, order, place + 1
        if self._step_index == len(self.timesteps):
            self._forget()
        return StepOutput(prev_sample, value if c.predict_x0 else None)

    def _corrected(self, sample: Tensor, level: NoiseLevel, value: Tensor, place: int) -> Tensor:
        if self._last_sample is None or place - 1 in self.config.disable_corrector:
            return sample
        past = self._past[-self._last_order :]
        stretch = unipc_stretch(self._last_sample, level, past, self.config.solver_type, self.config.predict_x0)
        return unic_step(stretch, value - past[-1].value)

    def _order(self, place: int, predictions: int) -> int:
        """The order of the step at `place`: at most the number of predictions, and lower in the last steps."""
        if self._without_span(place):
            return 1
        return min(predictions, len(self.timesteps) - place) if self.config.lower_order_final else predictions
