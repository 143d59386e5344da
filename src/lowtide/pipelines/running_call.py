"""What the call that runs was told, under the names by which callbacks of scripts read it and change it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lowtide.pipelines.not_finite import NotFiniteWarning, is_finite, said_of


class RunningCall:
    """The settings of the call that runs, or ran last; a callback may assign `_guidance_scale` and `_interrupt`.

    A guidance changed in a callback holds from the next step on; `_interrupt = True` ends the steps, and what there is
    then is decoded. Other threads may assign `interrupt`, too.
    """

    _guidance_scale: float = 1.0
    _guidance_rescale: float = 0.0
    _clip_skip: int | None = None
    _num_timesteps: int = 0
    _current_timestep: Any = None
    _interrupt: bool = False
    _is_finite: bool = True

    def begin(self, guidance_scale: float, *, guidance_rescale: float = 0.0, clip_skip: int | None = None) -> None:
        """Take over what a call was told; nothing has interrupted it yet."""
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._clip_skip, self._interrupt, self._current_timestep = clip_skip, False, None
        self._is_finite = True

    def check_finite(self, stage: str, numbers: torch.Tensor) -> None:
        """Warn with `NotFiniteWarning`, once a run, if what a stage made is not finite: the first stage is named."""
        if self._is_finite and not is_finite(numbers):
            self._is_finite = False
            warnings.warn(said_of(stage, numbers), NotFiniteWarning, stacklevel=3)

    @property
    def guidance_scale(self) -> float:
        """The guidance of the next step."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._guidance_scale = scale

    @property
    def guidance_rescale(self) -> float:
        """How much of the deviation of the prompt's prediction the guided one is given back."""
        return self._guidance_rescale

    @guidance_rescale.setter
    def guidance_rescale(self, share: float) -> None:
        self._guidance_rescale = share

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step is guided."""
        return self._guidance_scale > 1

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers are left out."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> None:
        """Nothing: they are for adapters."""
        return

    @property
    def attention_kwargs(self) -> None:
        """Nothing: they are for adapters."""
        return

    @property
    def num_timesteps(self) -> int:
        """Model calls of the run."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step that runs; None outside the steps."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether no more steps are taken."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, now: bool) -> None:
        self._interrupt = now
