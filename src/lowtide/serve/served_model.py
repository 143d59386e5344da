"""A model that is served: what it makes, what its call takes, and how its plans call that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lowtide
from lowtide.fitting.meta_subject import MetaSubject
from lowtide.fitting.prepare import Fit, prepare
from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.guests.guest_dtype import guest_dtypes
from lowtide.guests.library import pipeline_class
from lowtide.hub import Source
from lowtide.loading.components import LoadOptions
from lowtide.loading.model_index import MODEL_INDEX, read_model_index
from lowtide.loading.original_file import FileOptions, configs_of
from lowtide.memory.presets import execution_device
from lowtide.pipelines.load import open_checkpoint
from lowtide.pipelines.own_dtype import own_dtypes
from lowtide.pipelines.parts import KINDS
from lowtide.planning.plan import Budgets
from lowtide.schedulers import SCHEDULERS, SHORT_NAMES
from lowtide.serve.kept_dtype import kept_dtype
from lowtide.weights.fill import dtype_name

SAMPLER = "sampler"
SIZES = {"height": "height", "width": "width", "num_inference_steps": "steps", "num_frames": "frames"}
"""What plans of our own pipelines call arguments of a call on which memory depends."""
SAMPLERS = {
    "StableDiffusionPipeline": ("ddim", "pndm", "unipc", "euler", "dpm"),
    "CogVideoXPipeline": ("cogvideox-ddim", "cogvideox-dpm"),
}
"""The short names of schedulers that pipelines of ours can be given."""
MOST_TRACED = 50
"""Sizes of calls that are remembered, from which plans are made quickly."""
SHOWN = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt", "strength")
"""Arguments whose values by default are told."""


class ServedModel:
    """A model in a folder or on the Hub. Raises what `lowtide.load` does for one that is not there.

    It computes in the dtype called `dtype`; "auto" is that of `lowtide generate`, and is kept in the folder `notes` by
    the model's `name`.
    """

    def __init__(
        self, source: str, device: torch.device, dtype: str = "auto", notes: Path = Path(), name: str = "model"
    ) -> None:
        self.source, self._device, self._asked = source, device, dtype
        self._notes, self._name = notes, name
        self.class_name = read_model_index(self._configs().fetch([MODEL_INDEX]))[0]
        if not self.is_ours:
            pipeline_class(self.class_name)  # its library takes memory, which plans are to see
        self._own_scheduler: Any = None
        self._sampler: str | None = None

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """In which it computes; None is as its files have it."""
        chosen: str | None = self._asked
        if chosen == "auto":
            chosen = kept_dtype(self._notes, self._name, [self.source, self._device.type], self._fastest)
        return None if chosen is None else getattr(torch, chosen)

    def _fastest(self) -> str | None:
        if self.is_ours:
            return own_dtypes(self._configs(), self._device.type)[0]
        checkpoint = GuestCheckpoint.opened(Source(self.source), {})
        chosen = guest_dtypes(checkpoint, checkpoint.parts(), self._device)[0]
        return None if chosen is None else dtype_name(chosen)

    def _configs(self) -> Source:
        """Where its configurations are: a file of weights has those that were published for such models."""
        return configs_of(Source(self.source), FileOptions())

    @property
    def is_ours(self) -> bool:
        """Whether its pipeline is one of Lowtide's own."""
        return self.class_name in KINDS

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Of its call."""
        if self.is_ours:
            call = inspect.signature(getattr(lowtide, self.class_name).__call__)
            return {name: each for name, each in call.parameters.items() if name not in ("self", "others")}
        from lowtide.guests.written_call import call_of

        return call_of(self.class_name).parameters

    def about(self) -> dict[str, Any]:
        """What it makes, what its call takes and the usual values of that, and its samplers.

        `planned_by` names the arguments on which its plans depend; None is for all.
        """
        samplers = SAMPLERS.get(self.class_name, ())
        usual = {name: self.parameters[name].default for name in SHOWN if name in self.parameters}
        return {
            "kind": self.class_name,
            "makes": "clips" if {"num_frames", "frames"} & self.parameters.keys() else "pictures",
            "arguments": [*self.parameters, *([SAMPLER] if samplers else [])],
            "defaults": {name: value for name, value in usual.items() if isinstance(value, (int, float, str))},
            "size": self._usual_size(),
            "samplers": list(samplers),
            "planned_by": list(SIZES) if self.is_ours else None,
        }

    def _usual_size(self) -> dict[str, int] | None:
        size = self._meta.subject.usual_size() if self.is_ours else None
        return None if size is None else {"width": size.width, "height": size.height}

    def prepared(self, call: Mapping[str, Any], budgets: Budgets) -> Fit:
        """All that plans for a call are made from; none of its weights are read."""
        if self.is_ours:
            if len(self._meta.traced) > MOST_TRACED:
                del self._meta
            return prepare(self._meta, budgets, self._meta.subject.usual_size(**self.size(call)))
        checkpoint = GuestCheckpoint.opened(Source(self.source), dict(call), self.dtype, None, None)
        return checkpoint.prepared(checkpoint.parts(), budgets, (), self._device)

    @cached_property
    def _meta(self) -> MetaSubject:
        return open_checkpoint(Source(self.source), LoadOptions(self.dtype)).on_meta(self._device)

    def size(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What of a call plans depend on, as plans call it."""
        if not self.is_ours:
            return dict(call)
        size = {SIZES[name]: value for name, value in call.items() if name in SIZES}
        prompts = call.get("prompt")
        return {**size, "prompts": len(prompts), "pictures": len(prompts)} if isinstance(prompts, list) else size

    def pictures(self, given: Mapping[str, Sequence[Image.Image]]) -> dict[str, Any]:
        """Pictures as arguments: one, or a list where there are several."""
        return {name: many[0] if len(many) == 1 else list(many) for name, many in given.items()}

    def take_sampler(self, pipe: Any, sampler: str | None) -> None:
        """Have a pipeline take its steps by the sampler with this short name, or by its own.

        It stays until another is asked for, since plans are made anew for each change.
        """
        if self._own_scheduler is None:
            self._own_scheduler = getattr(pipe, "scheduler", None)
        if sampler == self._sampler:
            return
        own, self._sampler = self._own_scheduler, sampler
        pipe.scheduler = own if sampler is None else SCHEDULERS[SHORT_NAMES[sampler]].from_config(own.config)

    def channels(self, pipe: Any) -> int | None:
        """Of its latents; None where it does not say."""
        config = getattr(getattr(pipe, "vae", None), "config", None)
        return getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)

    @staticmethod
    def tells_of_steps(pipe: Any) -> bool:
        """Whether the call of a pipeline tells of its steps."""
        return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters

    @staticmethod
    def device(asked: str | None) -> torch.device:
        """Where to compute; raises `ValueError` for what there is not."""
        return execution_device(None if asked == "auto" else asked)


def many(call: Mapping[str, Any], texts: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A call for as many pictures or clips as there are texts, one of each."""
    if len(texts) == 1:
        return {**call, **texts[0]}
    return {**call, **{name: [each[name] for each in texts] for name in texts[0]}}
