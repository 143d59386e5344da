"""A copy of a pipeline whose networks are on meta: what its stages are traced with."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, TypeVar

import torch

from lowtide.planning.workload import WHOLE
from lowtide.prediction.meta_copy import meta_copy

if TYPE_CHECKING:
    from lowtide.pipelines.base import DiffusionPipeline

PipelineT = TypeVar("PipelineT", bound="DiffusionPipeline")


def on_meta(pipe: PipelineT, but: Collection[str] = ()) -> PipelineT:
    """A copy with networks on meta and a scheduler that computes nothing, every stage set to be gone through whole.

    Networks named in `but` are not copied: they are on meta already, and nobody else has them.
    """
    copied = copy.copy(pipe)
    for name, module in pipe.modules().items():
        if name not in but:
            setattr(copied, name, meta_copy(module))
    copied.scheduler = StillScheduler(pipe.scheduler)
    for ways in copied.ways().values():
        ways.set(WHOLE)
    return copied


class StillScheduler:
    """Stands for a scheduler where nothing is computed: real ones look at numbers."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: object) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self.config = getattr(scheduler, "config", None)

    def scale_model_input(self, sample: torch.Tensor, timestep: object = None) -> torch.Tensor:
        """The sample."""
        return sample

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Lay out the timesteps of the scheduler that it stands for."""
        self._scheduler.set_timesteps(num_inference_steps)  # type: ignore[attr-defined]

    @property
    def timesteps(self) -> torch.Tensor:
        """Those that were laid out last."""
        return self._scheduler.timesteps  # type: ignore[attr-defined]
