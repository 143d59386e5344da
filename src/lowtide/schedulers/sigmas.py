"""What Euler, DPM-Solver and UniPC share: the sigmas of the timesteps, and the place of the current step among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import SchedulerBase, SchedulerConfig, Timestep, spread

OFF = (False, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaConfig(SchedulerConfig):
    """`use_karras_sigmas` spaces the steps by arXiv 2206.00364, `use_exponential_sigmas` evenly in log σ.

    `final_sigmas_type` ends at σ = 0 or at timestep 0.
    """

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerConfig.ALLOWED,
        "use_karras_sigmas": (False, True, None),
        "final_sigmas_type": ("zero", "sigma_min"),
        "use_exponential_sigmas": (False, True, None),
        "use_beta_sigmas": OFF,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepConfig(SigmaConfig):
    """`lower_order_final` lowers the order in the last steps, which steadies short runs."""

    solver_order: int = 2
    lower_order_final: bool = True

    IDLE: ClassVar[Mapping[str, Any]] = {
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "flow_shift": 1.0,
        "time_shift_type": "exponential",
    }
    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaConfig.ALLOWED,
        "solver_order": (1, 2, 3),
        "thresholding": OFF,
        "use_flow_sigmas": OFF,
        "use_dynamic_shifting": OFF,
    }


SigmaConfigT = TypeVar("SigmaConfigT", bound=SigmaConfig)


class SigmaScheduler(SchedulerBase[SigmaConfigT]):
    """A scheduler that steps through `sigmas` (variance-exploding, float32, on the CPU, one more than `timesteps`).

    The first call after `set_timesteps` finds its place by its timestep, or begins where `set_begin_index` says; the
    next calls must follow in order. `_step_index` is the place of the next step; None before the first.
    """

    def __init__(self, config: SigmaConfigT, *, zero_snr: bool) -> None:
        super().__init__(config, zero_snr=zero_snr)
        if zero_snr:
            self.alphas_cumprod[-1] = noise_schedule.SMALLEST_ALPHA_BAR
        self.sigmas = torch.cat([noise_schedule.training_sigmas(self.alphas_cumprod).float().flip(0), torch.zeros(1)])
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def _training_sigmas(self) -> NDArray[np.float32]:
        """The sigmas of all training timesteps, of the noise levels that the scheduler has now."""
        return noise_schedule.training_sigmas(self.alphas_cumprod).float().numpy()

    @property
    def step_index(self) -> int | None:
        """The place of the next step among the timesteps; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The place where the first step begins, if it was told by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Have the first step begin at this place, whatever its timestep; until the next `set_timesteps`."""
        self._begin_index = begin_index

    def _lay_out(self, timesteps: Tensor, sigmas: NDArray[np.floating], last: float) -> None:
        self.num_inference_steps = len(timesteps)
        self.timesteps = timesteps
        self.sigmas = torch.as_tensor(np.append(sigmas, last), dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

    def _spread_sigmas(self, high: float, low: float, num_steps: int) -> NDArray[np.float64] | None:
        """Falling sigmas as the configuration spaces them; None where it spaces timesteps."""
        if self.config.use_karras_sigmas:
            return noise_schedule.karras_sigmas(high, low, num_steps)
        if self.config.use_exponential_sigmas:
            return noise_schedule.exponential_sigmas(high, low, num_steps)
        return None

    def _check_told(self, told: Sequence[float], num_inference_steps: int | None) -> None:
        """Raise `ValueError` where timesteps are told to a scheduler that cannot have them."""
        if num_inference_steps is not None:
            raise ValueError("num_inference_steps and timesteps or sigmas are both given; give one of them.")
        if self.config.use_karras_sigmas or self.config.use_exponential_sigmas:
            raise ValueError("timesteps are not possible where the sigmas are spaced: leave out use_karras_sigmas.")
        noise_schedule.check_told(np.asarray(told, dtype=np.float64), self.config.num_train_timesteps)

    def _sigmas_at(self, timesteps: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.interp(timesteps, np.arange(len(self._training_sigmas)), self._training_sigmas)

    def _find(self, timestep: Timestep) -> int:
        """The first place of `timestep` in `timesteps`; raises `ValueError` if it is not among them."""
        value = float(timestep)
        matches = (self.timesteps == value).nonzero()
        if len(matches) == 0:
            raise ValueError(
                f"Timestep {value:g} is none of {type(self).__name__}.timesteps: take one that set_timesteps laid out."
            )
        return int(matches[0])

    def _enter(self, timestep: Timestep) -> int:
        """The place of the step at `timestep`. Raises `ValueError` before `set_timesteps` and after the last step."""
        num_steps = self._num_inference_steps()
        if self._step_index is None:
            self._step_index = self._find(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= num_steps:
            raise ValueError(f"All {num_steps} steps are done: call set_timesteps before stepping again.")
        return self._step_index

    def _without_span(self, place: int) -> bool:
        """Whether the step at `place` is infinite (it ends at σ = 0) or empty in log α/σ, so that no history counts."""
        return bool(self.sigmas[place + 1] == 0 or self.sigmas[place + 1] == self.sigmas[place])

    def _sigmas_like(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        return spread(self.sigmas[[self._find(t) for t in timesteps.flatten()]], sample)

    def _noised(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The variance-preserving sample at some of `self.timesteps`."""
        level = noise_schedule.noise_level(self._sigmas_like(timesteps, original.float()))
        return level.alpha.to(original.dtype) * original + level.sigma.to(original.dtype) * noise
