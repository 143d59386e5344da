"""What DPM-Solver and UniPC share: their entries, the levels of flows, and predictions kept in bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.noise_schedule import NoiseLevel
from lowtide.schedulers.scheduler_entries import RANGES, check_needs, unsupported
from lowtide.schedulers.sigmas import SigmaConfig, SigmaScheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTIONS = ("flow_prediction", "epsilon", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepConfig(SigmaConfig):
    """`lower_order_final` lowers the order in the last steps, which steadies short runs.

    `thresholding` keeps x₀ in bounds that its own values set (`noise_schedule.threshold`).
    `use_flow_sigmas` is for models of rectified flows: σ falls evenly from 1, shifted by `flow_shift`. With
    `use_dynamic_shifting` `set_timesteps` takes `mu`: the shift is exp(mu), or for time_shift_type="linear" mu itself.
    """

    solver_order: int = 2
    lower_order_final: bool = True
    thresholding: bool | None = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    use_flow_sigmas: bool | None = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool | None = False
    time_shift_type: str = "exponential"

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaConfig.ALLOWED,
        "prediction_type": (*PREDICTIONS, "flow_prediction"),
        "solver_order": (1, 2, 3),
        "time_shift_type": ("exponential", "linear"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = FLOW_PREDICTIONS if self.use_flow_sigmas else PREDICTIONS
        if self.prediction_type not in possible:
            flow = f"where use_flow_sigmas={self.use_flow_sigmas}"
            raise unsupported(self, "prediction_type", f"one of {', '.join(map(repr, possible))} {flow}")
        check_needs(self, "use_dynamic_shifting", "use_flow_sigmas")
        if self.use_flow_sigmas and self.integrates_noise:
            raise ValueError(
                "A flow begins in pure noise, from where only the clean sample can be integrated: leave out "
                "predict_x0=False, or choose an algorithm_type with '++'."
            )

    @property
    def integrates_noise(self) -> bool:
        """Whether the solver integrates the noise predicted, not the clean sample."""
        raise NotImplementedError


class Prediction(NamedTuple):
    """What a solver integrates, x₀ or ε, and the noise level at which it was predicted."""

    level: NoiseLevel
    value: Tensor


MultistepConfigT = TypeVar("MultistepConfigT", bound=MultistepConfig)


class MultistepScheduler(SigmaScheduler[MultistepConfigT]):
    """A scheduler whose samples are variance-preserving, or those of a flow."""

    def __init__(self, config: MultistepConfigT) -> None:
        super().__init__(config)
        if config.use_flow_sigmas:
            self.sigmas = torch.cat([self.timesteps / config.num_train_timesteps, torch.zeros(1)])

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α_t `original` + σ_t `noise`; `timesteps` are some of `self.timesteps`, one per sample or one for all."""
        level = self._level(self._sigmas_like(timesteps, original.float()))
        return level.alpha.to(original.dtype) * original + level.sigma.to(original.dtype) * noise

    def _level(self, sigma: Tensor) -> NoiseLevel:
        return noise_schedule.flow_level(sigma) if self.config.use_flow_sigmas else noise_schedule.noise_level(sigma)

    def _predicted(self, model_output: Tensor, sample: Tensor, level: NoiseLevel) -> Tensor:
        """What the solver integrates, from what the model predicts: x₀, kept in bounds, or ε that fits to it."""
        c, (alpha, sigma, _) = self.config, level
        if c.integrates_noise and not c.thresholding:
            return noise_schedule.predict_noise(c.prediction_type, model_output, sample, alpha, sigma)
        original = noise_schedule.predict_original(c.prediction_type, model_output, sample, alpha, sigma)
        if c.thresholding:
            original = noise_schedule.threshold(original, c.dynamic_thresholding_ratio, c.sample_max_value)
        if not c.integrates_noise:
            return original
        return noise_schedule.predict_noise("sample", original, sample, alpha, sigma)

    def _shift(self, mu: float | None) -> float:
        """The shift of a flow's sigmas. Raises `ValueError` for `mu` that is not asked for, or out of range."""
        if mu is None:
            return self.config.flow_shift
        if not self.config.use_dynamic_shifting:
            raise ValueError(f"mu={mu!r:.80} is possible only with use_dynamic_shifting=True; leave it out.")
        low, high = RANGES["flow_shift"]
        exponential = self.config.time_shift_type == "exponential"
        least, most = (math.log(low), math.log(high)) if exponential else (low, high)
        if not least <= mu <= most:
            raise ValueError(f"mu={mu!r:.80} is not possible: give a number from {least:.4g} to {most:.4g}.")
        return math.exp(mu) if exponential else float(mu)
