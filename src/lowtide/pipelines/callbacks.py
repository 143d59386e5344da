"""What a call tells after each step, to callbacks that may change its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from lowtide.pipelines import checks
from lowtide.pipelines.guidance import changed_by_callback

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
"""Called after each step with the pipeline, the step, the timestep and the tensors asked for; it may change these."""
OldCallback = Callable[[int, torch.Tensor, torch.Tensor], Any]
"""Called with the step, the timestep and the latents, as earlier scripts have it."""


@dataclass(frozen=True)
class Callbacks:
    """`on_step_end` is told of the tensors called `inputs`; `possible` are those that it may ask for and change.

    `callback` is told of every so many steps, and of none of the model calls that a scheduler takes in addition to the
    `steps` asked for, which are its first.
    """

    on_step_end: StepCallback | None
    inputs: Sequence[str]
    possible: Sequence[str]
    callback: OldCallback | None = None
    every: int = 1
    steps: int = 1

    @classmethod
    def of(
        cls,
        possible: Sequence[str],
        on_step_end: StepCallback | None,
        inputs: Sequence[str],
        callback: OldCallback | None = None,
        callback_steps: int | None = None,
        *,
        steps: int = 1,
    ) -> Self:
        """Those of a call; a callback that has `tensor_inputs` says itself what it asks for.

        Raises `ValueError` for tensors and numbers of steps that are not possible.
        """
        inputs = getattr(on_step_end, "tensor_inputs", inputs)
        checks.check_callback_inputs(inputs, possible)
        every = 1 if callback_steps is None else callback_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"callback_steps={every!r} is not possible: it must be a whole number, at least 1.")
        return cls(on_step_end, inputs, possible, callback, every, steps)

    def after_step(
        self, pipe: Any, step: int, timestep: torch.Tensor, x: torch.Tensor, embeds: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and embeddings after the callbacks have seen them; `others` can be looked at, and not changed."""
        if self.on_step_end is not None:
            negative = embeds[: len(x)] if len(embeds) == 2 * len(x) else None
            tensors = {"latents": x, "prompt_embeds": embeds, "negative_prompt_embeds": negative, **others}
            asked = {name: tensors[name] for name in self.inputs}
            returned = checks.check_returned(self.on_step_end(pipe, step, timestep, asked), self.possible)
            x, embeds, _ = changed_by_callback(x, embeds, negative, returned)
        if self.callback is not None and step % self.every == 0 and step >= pipe.num_timesteps - self.steps:
            self.callback(step, timestep, x)
        return x, embeds
