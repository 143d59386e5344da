"""DDIM (arXiv 2010.02502) on CogVideoX's noise schedule, without fresh noise."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from lowtide.schedulers.cogvideox_noise import CogVideoXConfig, CogVideoXScheduler
from lowtide.schedulers.common import Generators, StepOutput, Timestep


@dataclasses.dataclass(frozen=True, kw_only=True)
class CogVideoXDDIMConfig(CogVideoXConfig):
    """The same entries as `CogVideoXConfig`."""


def cogvideox_ddim_step(sample: Tensor, original: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The next sample from x_t and x₀ (arXiv 2010.02502, Eq. 12 with σ = 0, its ε replaced by x_t and x₀).

    The next sample is a x_t + (√ᾱ_prev - √ᾱ_t a) x₀ with a = √((1-ᾱ_prev)/(1-ᾱ_t)).
    """
    kept = ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
    return kept * sample + (alpha_bar_prev**0.5 - alpha_bar**0.5 * kept) * original


class CogVideoXDDIMScheduler(CogVideoXScheduler[CogVideoXDDIMConfig]):
    """DDIM for CogVideoX. It remembers nothing from step to step, so steps may be taken in any order.

    A step depends on its arguments and on the number of steps last given to `set_timesteps`, which sets how far the
    step leads.
    """

    config_class = CogVideoXDDIMConfig

    def __init__(self, config: CogVideoXDDIMConfig | None = None, **entries: Any) -> None:
        super().__init__(self._configured(config, entries))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep; the arguments after `sample` have no effect.

        Raises `ValueError` before `set_timesteps`, outside the training schedule, and where noise is predicted from
        pure noise.
        """
        at = int(self.number_of(timestep))
        bar_prev, original = self._alpha_bar(self._target(at)), self._original(model_output, sample, at)
        return StepOutput(cogvideox_ddim_step(sample, original, self._alpha_bar(at), bar_prev), original)
