"""Models within one budget, in the process that computes: what a call would take, and the call itself.

A model is loaded when it is first asked for, and stays. Each call is planned for what memory is left beside the others;
where that is not enough, the others are put under their smallest plans, so that their weights rest in their files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lowtide
from lowtide.fitting.budgets import parse_budgets
from lowtide.fitting.prepare import Fit
from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.guests.results import results_of
from lowtide.hub import Source
from lowtide.loading.model_index import MODEL_INDEX, read_model_index
from lowtide.media.unfinished import whole_or_not
from lowtide.memory.presets import execution_device
from lowtide.pipelines.load import prepare_checkpoint
from lowtide.pipelines.parts import KINDS
from lowtide.planning.plan import BudgetError, Budgets, Plan
from lowtide.utils import export_to_video

SIZES = {"height": "height", "width": "width", "num_inference_steps": "steps", "num_frames": "frames"}
"""What plans of our own pipelines call arguments of a call on which memory depends."""

FPS = 8
"""Frames a second of clips, as their published models make them."""

Told = Callable[..., None]
"""Told of what a call has done: of `step` of `steps`."""


class CancelledError(Exception):
    """The call was asked to end."""


class Engine:
    """The models called `models` by name, each a folder or a Hub id, within budgets as `lowtide.fit` takes them.

    Of `ram`, so many bytes are `beside` this process, in the server. Raises what `lowtide.load` does for models that
    are not there, and `ValueError` for devices and budgets that are not possible.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        vram: str | None = None,
        ram: str | None = None,
        device: str | None = None,
        beside: int = 0,
    ) -> None:
        self._models = dict(models)
        self._device = execution_device(None if device == "auto" else device)
        budgets = parse_budgets(self._device, vram, ram, None)
        self._budgets = budgets if budgets.ram is None else replace(budgets, ram=max(1, budgets.ram - beside))
        self._pipes: dict[str, Any] = {}
        self._classes = {name: read_model_index(Source(each).fetch([MODEL_INDEX]))[0] for name, each in models.items()}

    def names_of(self, model: str) -> list[str]:
        """The arguments that a model's call takes."""
        class_name = self._classes[model]
        if class_name in KINDS:
            call = getattr(lowtide, class_name).__call__
            return [name for name in inspect.signature(call).parameters if name not in ("self", "others")]
        from lowtide.guests.written_call import call_of

        return list(call_of(class_name).parameters)

    def plan(self, model: str, call: Mapping[str, Any]) -> dict[str, Any]:
        """What a call takes: bytes, seconds and the plan, or, with `fits` false, the least that would be enough.

        Raises `ValueError` for a call that is not possible.
        """
        fit = self._prepared(model, call)
        try:
            plan = fit.choose()
        except BudgetError as refusal:
            return {"fits": False, **in_words(refusal)}
        return {"fits": True, **_in_numbers(plan)}

    def _prepared(self, model: str, call: Mapping[str, Any]) -> Fit:
        source = self._models[model]
        if self._classes[model] in KINDS:
            return prepare_checkpoint(source, self._budgets, device=self._device, **_sizes(call))
        checkpoint = GuestCheckpoint.opened(Source(source), dict(call), None, None, None)
        return checkpoint.prepared(checkpoint.parts(), self._budgets, (), self._device)

    def run(
        self, model: str, call: Mapping[str, Any], seeds: list[int], folder: Path, told: Told, *, share: float = 1.0
    ) -> dict[str, Any]:
        """Make a picture or clip for each seed, as files in `folder`, and say what it took.

        `told` may raise to end it. `share` is how much of the budget it may take.
        """
        pipe = self._within(model, call, share)
        files: list[str] = []
        for place, seed in enumerate(seeds):
            generator = torch.Generator("cpu").manual_seed(seed)
            output = pipe(**call, **_watched(pipe, told, place), generator=generator)
            files += _written(output, folder, len(files))
        plan = lowtide.plan_of(pipe)
        taken = lowtide.report(pipe)
        measured = max((stage.peak or 0 for stage in taken.stages), default=0)
        return {"files": files, "measured": measured, **({} if plan is None else _in_numbers(plan))}

    def _within(self, model: str, call: Mapping[str, Any], share: float) -> Any:
        """The model's pipeline, planned for this call beside the other models.

        In a share of the budget that is too little for any plan, it is planned for the least that is enough.
        """
        given = self._budgets
        vram, ram = (None if each is None else int(each * share) for each in (given.vram, given.ram))
        budgets = Budgets(vram, ram)
        try:
            return self._planned(model, call, budgets)
        except BudgetError:
            for name in [name for name in self._pipes if name != model]:
                self._put_to_rest(name)
        try:
            return self._planned(model, call, budgets)
        except BudgetError as refusal:
            if share == 1 or not _is_within(refusal.minimum, given):
                raise
            return self._planned(model, call, refusal.minimum)

    def _planned(self, model: str, call: Mapping[str, Any], budgets: Budgets) -> Any:
        given = {"vram": budgets.vram, "ram": budgets.ram, "device": self._device}
        size = _sizes(call) if self._classes[model] in KINDS else dict(call)
        pipe = self._pipes.get(model)
        if pipe is None:
            pipe = self._pipes[model] = lowtide.load(self._models[model], **given, **size)
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            return pipe
        lowtide.fit(pipe, **given, **size)
        return pipe

    def _put_to_rest(self, model: str) -> None:
        pipe, made_for = self._pipes[model], lowtide.plan_of(self._pipes[model])
        call = {} if made_for is None else dict(made_for.made_for)
        try:
            lowtide.fit(pipe, vram=1, ram=1, device=self._device, **call)
        except BudgetError as refusal:
            lowtide.fit(pipe, refusal.minimum.vram, refusal.minimum.ram, device=self._device, **call)


def _is_within(budgets: Budgets, given: Budgets) -> bool:
    pairs = ((budgets.vram, given.vram), (budgets.ram, given.ram))
    return all(least is None or most is None or least <= most for least, most in pairs)


def _watched(pipe: Any, told: Told, place: int) -> dict[str, Any]:
    names = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" not in names:
        return {}

    def after_step(_: Any, step: int, *_rest: Any) -> dict[str, Any]:
        told(picture=place, step=step + 1)
        return {}

    return {"callback_on_step_end": after_step}


def _written(output: Any, folder: Path, begin: int) -> list[str]:
    """The names of files of what came out, the first of which is number `begin`; each is whole or not there."""
    results = results_of(output)
    names: list[str] = []
    for place, picture in enumerate(results.pictures, begin):
        with whole_or_not(folder / f"{place}.png") as unfinished:
            picture.save(unfinished, format="PNG")
        names.append(f"{place}.png")
    for place, clip in enumerate(results.clips, begin + len(names)):
        export_to_video(clip, str(folder / f"{place}.mp4"), fps=FPS)
        names.append(f"{place}.mp4")
    return names


def _sizes(call: Mapping[str, Any]) -> dict[str, Any]:
    return {SIZES[name]: value for name, value in call.items() if name in SIZES}


def in_words(refusal: BudgetError) -> dict[str, Any]:
    """Why there is no plan, and the least that would be enough."""
    least = refusal.minimum
    return {"why": str(refusal), "minimum": {"vram": least.vram, "ram": least.ram}}


def _in_numbers(plan: Plan) -> dict[str, Any]:
    """A plan's bytes and seconds, and its text."""
    return {
        "peak": plan.peak,
        "seconds": sum(stage.seconds for stage in plan.stages),
        "exactness": plan.exactness,
        "stages": [{"name": stage.name, "peak": stage.peak, "seconds": stage.seconds} for stage in plan.stages],
        "plan": str(plan),
    }
