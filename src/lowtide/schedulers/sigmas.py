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
from lowtide.schedulers.scheduler_entries import check_apart

SPREADS = {
    "use_karras_sigmas": noise_schedule.karras_sigmas,
    "use_exponential_sigmas": noise_schedule.exponential_sigmas,
    "use_lu_lambdas": noise_schedule.exponential_sigmas,  # evenly in log α/σ is evenly in log σ
    "use_beta_sigmas": noise_schedule.beta_sigmas,
}
"""Entry -> falling sigmas from the largest, the smallest and their number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaConfig(SchedulerConfig):
    """`use_karras_sigmas` spaces the steps by arXiv 2206.00364, `use_exponential_sigmas` evenly in log σ.

    `use_beta_sigmas` spaces them densely at both ends (arXiv 2407.12173). `final_sigmas_type` ends at σ = 0 or at
    timestep 0.
    """

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False

    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SchedulerConfig.ALLOWED,
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    # The entries that space sigmas themselves instead of timesteps; at most one is on.
    SPACINGS: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_apart(self, *self.SPACINGS)

    @property
    def spacing(self) -> str | None:
        """The entry that spaces the sigmas themselves; None where timesteps are spaced."""
        return next((key for key in self.SPACINGS if getattr(self, key)), None)


SigmaConfigT = TypeVar("SigmaConfigT", bound=SigmaConfig)


class SigmaScheduler(SchedulerBase[SigmaConfigT]):
    """A scheduler that steps through `sigmas` (float32, on the CPU, one more than `timesteps`).

    They are those of variance-exploding samples, or of a flow.
    The first call after `set_timesteps` finds its place by its timestep, or begins where `set_begin_index` says; the
    next calls must follow in order. `_step_index` is the place of the next step; None before the first.
    """

    def __init__(self, config: SigmaConfigT) -> None:
        super().__init__(config, zero_snr=config.rescale_betas_zero_snr)
        if config.rescale_betas_zero_snr:
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
        spread_between = SPREADS.get(self.config.spacing or "")
        return None if spread_between is None else spread_between(high, low, num_steps)

    def _check_told(self, name: str, num_inference_steps: int | None) -> None:
        """Raise `ValueError` where timesteps or sigmas (`name` says which) cannot be told."""
        if num_inference_steps is not None:
            raise ValueError(f"num_inference_steps and {name} are both given; give one of them.")
        if self.config.spacing is not None:
            raise ValueError(f"{name} are not possible where sigmas are spaced: leave out {self.config.spacing}.")

    def _places_told(self, timesteps: Sequence[float], num_inference_steps: int | None) -> NDArray[np.float64]:
        """The timesteps that were told. Raises `ValueError` where they are not possible."""
        self._check_told("timesteps", num_inference_steps)
        places = np.asarray(timesteps, dtype=np.float64)
        noise_schedule.check_told(places, self.config.num_train_timesteps)
        return places

    def _sigmas_at(self, timesteps: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.interp(timesteps, np.arange(len(self._training_sigmas)), self._training_sigmas)

    def _find(self, timestep: Timestep) -> int:
        """The first place of `timestep` in `timesteps`; raises `ValueError` if it is not among them."""
        value = float(self.number_of(timestep))
        place = next((place for place, known in enumerate(self.timesteps.tolist()) if known == value), None)
        if place is None:
            raise ValueError(
                f"Timestep {value:g} is none of {type(self).__name__}.timesteps: take one that set_timesteps laid out."
            )
        return place

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
