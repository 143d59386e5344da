"""What Euler, DPM-Solver and UniPC share: the sigmas of the timesteps, and the place of the current step among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.schedulers import noise_schedule
from lowtide.schedulers.common import ConfigT, SchedulerBase, SchedulerConfig, Timestep, spread

OFF = (False, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaConfig(SchedulerConfig):
    """`use_karras_sigmas` spaces the steps by arXiv 2206.00364; `final_sigmas_type` ends at σ = 0 or at timestep 0."""

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerConfig.ALLOWED,
        "use_karras_sigmas": (False, True, None),
        "final_sigmas_type": ("zero", "sigma_min"),
        "use_exponential_sigmas": OFF,
        "use_beta_sigmas": OFF,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultistepConfig(SigmaConfig):
    """`lower_order_final` lowers the order in the last steps, which steadies short runs."""

    solver_order: int = 2
    lower_order_final: bool = True

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SigmaConfig.ALLOWED,
        "solver_order": (1, 2, 3),
        "thresholding": OFF,
        "use_flow_sigmas": OFF,
        "use_dynamic_shifting": OFF,
    }


class SigmaScheduler(SchedulerBase[ConfigT]):
    """A scheduler that steps through `sigmas` (variance-exploding, float32, on the CPU, one more than `timesteps`).

    The first call after `set_timesteps` finds its place by its timestep; the next calls must follow in order.
    """

    def __init__(self, config: ConfigT, *, zero_snr: bool) -> None:
        super().__init__(config, zero_snr=zero_snr)
        if zero_snr:
            self.alphas_cumprod[-1] = noise_schedule.SMALLEST_ALPHA_BAR
        training = noise_schedule.training_sigmas(self.alphas_cumprod)
        self._training_sigmas: NDArray[np.float32] = training.numpy()
        self.sigmas = torch.cat([training.flip(0), torch.zeros(1)])
        self._place: int | None = None

    def _lay_out(self, timesteps: Tensor, sigmas: NDArray[np.floating], last: float) -> None:
        self.num_inference_steps = len(timesteps)
        self.timesteps = timesteps
        self.sigmas = torch.as_tensor(np.append(sigmas, last), dtype=torch.float32)
        self._place = None

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
        if self._place is None:
            self._place = self._find(timestep)
        if self._place >= num_steps:
            raise ValueError(f"All {num_steps} steps are done: call set_timesteps before stepping again.")
        return self._place

    def _without_span(self, place: int) -> bool:
        """Whether the step at `place` is infinite (it ends at σ = 0) or empty in log α/σ, so that no history counts."""
        return bool(self.sigmas[place + 1] == 0 or self.sigmas[place + 1] == self.sigmas[place])

    def _sigmas_like(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        return spread(self.sigmas[[self._find(t) for t in timesteps.flatten()]], sample)

    def _noised(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The variance-preserving sample at some of `self.timesteps`."""
        level = noise_schedule.noise_level(self._sigmas_like(timesteps, original.float()))
        return level.alpha.to(original.dtype) * original + level.sigma.to(original.dtype) * noise
