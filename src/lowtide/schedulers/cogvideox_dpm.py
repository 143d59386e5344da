"""SDE-DPM-Solver++ (arXiv 2211.01095), first order and 2M, on CogVideoX's noise schedule: fresh noise at each step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowtide.schedulers.cogvideox_noise import CogVideoXConfig, CogVideoXScheduler
from lowtide.schedulers.common import Generators, StepOutput, Timestep, draw_noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class CogVideoXDPMConfig(CogVideoXConfig):
    """The same entries as `CogVideoXConfig`."""


class Prediction(NamedTuple):
    """A prediction of the clean sample, the timestep at which it was made, and the place of that in the run."""

    place: int
    timestep: int
    original: Tensor


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """λ = log √(ᾱ/(1-ᾱ)), which is minus infinity at ᾱ = 0 and infinity at ᾱ = 1."""
    return ((alpha_bar / (1 - alpha_bar)) ** 0.5).log()


def sde_dpm_step(sample: Tensor, original: Tensor, fresh: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """One step of SDE-DPM-Solver++ (arXiv 2211.01095), with `fresh` standard normal noise.

    The next sample is (σ_t/σ_s) e^-h x_s + α_t (1 - e^-2h) x₀ + σ_t √(1 - e^-2h) z over h = λ_t - λ_s, which may be
    infinite. s is the level of `alpha_bar`, t that of `alpha_bar_prev`.
    """
    h = half_log_snr(alpha_bar_prev) - half_log_snr(alpha_bar)
    kept = ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5 * torch.exp(-h)
    mean = kept * sample - (torch.expm1(-2 * h) * alpha_bar_prev**0.5) * original
    return mean + ((1 - alpha_bar_prev) ** 0.5 * (1 - torch.exp(-2 * h)) ** 0.5) * fresh


def extrapolated(original: Tensor, before: Tensor, alpha_bars: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The x₀ of a 2M step, (1 + 1/2r) x₀ - (1/2r) x₀' with r = (λ_s - λ_r)/(λ_t - λ_s) (arXiv 2211.01095).

    `before` is x₀'. `alpha_bars` are ᾱ_r where `before` was predicted, ᾱ_s where `original` was predicted, and ᾱ_t of
    the next sample.
    """
    oldest, now, target = (half_log_snr(bar) for bar in alpha_bars)
    ratio = (now - oldest) / (target - now)
    return (1 + 1 / (2 * ratio)) * original - (1 / (2 * ratio)) * before


class CogVideoXDPMScheduler(CogVideoXScheduler[CogVideoXDPMConfig]):
    """SDE-DPM-Solver++(2M) for CogVideoX; steps must be taken in the order of `timesteps`.

    A run may begin at any timestep, and a step at the first timestep begins a new run. The last prediction of the clean
    sample is remembered until the last step of the run, or the next `set_timesteps`.
    """

    config_class = CogVideoXDPMConfig

    def __init__(self, config: CogVideoXDPMConfig | None = None, **entries: Any) -> None:
        super().__init__(self._configured(config, entries))
        self._order: list[int] = []
        self._ordered = self.timesteps
        self._past: Prediction | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out `num_inference_steps` timesteps. Raises `ValueError` if they do not fit the training schedule."""
        super().set_timesteps(num_inference_steps)
        self._note_order()  # here, on the CPU, so that no step waits for the device
        self.timesteps = self._ordered = self.timesteps.to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *theirs: object,
        eta: float = 0.0,
        old_pred_original_sample: Tensor | None = None,
        timestep_back: Timestep | None = None,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to the next timestep, with noise drawn from `generator`.

        The last prediction and its timestep are remembered, so the peer's `old_pred_original_sample` and
        `timestep_back` need not be given, and have no effect; nor have the other arguments.
        Raises `ValueError` before `set_timesteps`, for a timestep that is not next, for a sample of another shape than
        that of the last step, and where noise is predicted from pure noise.
        """
        if theirs:
            raise TypeError(
                "CogVideoXDPMScheduler.step takes model_output, timestep and sample: it remembers the last prediction "
                "and its timestep itself. Give old_pred_original_sample and timestep_back by name, or leave them out."
            )
        at = int(self.number_of(timestep))
        target, place = self._target(at), self._find(at)
        past = self._past if self._past is not None and place == self._past.place + 1 else None
        self._check_shape(sample, past)
        bar, bar_prev = self._alpha_bar(at), self._alpha_bar(target)
        original = self._original(model_output, sample, at)
        fresh, denoised = self._draw(sample, generator), original
        if past is not None and target >= 0:
            # The published step draws again here and drops the first noise; so do we, for the same video from a seed.
            fresh = self._draw(sample, generator)
            denoised = extrapolated(original, past.original, (self._alpha_bar(past.timestep), bar, bar_prev))
        prev_sample = sde_dpm_step(sample, denoised, fresh, bar, bar_prev)
        self._past = None if place == len(self._order) - 1 else Prediction(place, at, original)
        return StepOutput(prev_sample, original)

    def _draw(self, sample: Tensor, generator: Generators) -> Tensor:
        return draw_noise(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def _note_order(self) -> None:
        self._order, self._ordered = [int(t) for t in self.timesteps.cpu()], self.timesteps
        self._past = None

    def _find(self, timestep: int) -> int:
        """The place of `timestep`: that after the last step's, or the first; at the start of a run any place."""
        if self._ordered is not self.timesteps:  # other timesteps were assigned
            self._note_order()
        order, past = self._order, self._past
        if past is not None and order[past.place + 1 : past.place + 2] == [timestep]:
            return past.place + 1
        if timestep not in order:
            raise ValueError(
                f"Timestep {timestep} is none of the {len(order)} that set_timesteps laid out: take those of "
                "CogVideoXDPMScheduler.timesteps in order, and call set_timesteps before a new clip."
            )
        if past is not None and timestep != order[0]:
            raise ValueError(
                f"Timestep {timestep} does not follow {past.timestep}: steps must be taken in the order of "
                "CogVideoXDPMScheduler.timesteps. Call set_timesteps before a new clip."
            )
        return order.index(timestep)

    def _check_shape(self, sample: Tensor, past: Prediction | None) -> None:
        if past is not None and past.original.shape != sample.shape:
            raise ValueError(
                f"The sample has shape {tuple(sample.shape)}, and the last step's prediction "
                f"{tuple(past.original.shape)}: one clip's steps must follow each other. "
                "Call set_timesteps before a new clip."
            )
