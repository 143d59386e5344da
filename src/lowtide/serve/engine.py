"""Models within one budget, in the process that computes: what a call would take, and the call itself.

A model is loaded when it is first asked for, and stays. Each call is planned for what memory is left beside the others;
where that is not enough, the others are put under their smallest plans, so that their weights rest in their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lowtide
from lowtide.fitting.budgets import parse_budgets
from lowtide.fitting.process import look_again
from lowtide.fitting.rate_check import unchecked
from lowtide.planning.plan import BudgetError, Budgets, Plan
from lowtide.serve.kept_answers import KeptAnswers
from lowtide.serve.made_files import most_of, stage_figures, write_all
from lowtide.serve.previews import Previews
from lowtide.serve.run_request import Picture, Run
from lowtide.serve.served_model import SAMPLER, ServedModel, many

BESIDE = 12 * 2**20
"""Bytes that serving takes beside a call: previews, answers that are kept, files, and plans made meanwhile."""
FASTER = 0.95
"""Pictures are made together where that takes less than this share of the time of one after the other."""
Told = Callable[..., None]
"""Told of what a call has done, by name; it may raise to end it."""


class CancelledError(Exception):
    """The call was asked to end."""


class Engine:
    """The models called `models` by name, each a folder or a Hub id, within budgets as `lowtide.fit` takes them.

    Of `ram`, so many bytes are `beside` this process, in the server. What is learned about models is in `notes`.
    `dtype` is as the command line has it. Raises what `lowtide.load` does for models that are not there, and
    `ValueError` for devices and budgets that are not possible.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        vram: int | str | None = None,
        ram: int | str | None = None,
        device: str | None = None,
        beside: int = 0,
        notes: str = ".",
        dtype: str = "auto",
    ) -> None:
        self._device = ServedModel.device(device)
        budgets = parse_budgets(self._device, vram, ram, None)
        self.budgets = budgets if budgets.ram is None else replace(budgets, ram=max(1, budgets.ram - beside))
        self._notes = Path(notes)
        self._models = {
            name: ServedModel(source, self._device, dtype, self._notes, name) for name, source in models.items()
        }
        self._pipes: dict[str, Any] = {}
        self._last: tuple[str, Budgets, dict[str, Any]] | None = None

    def about(self, model: str) -> dict[str, Any]:
        """What a model makes, and what its call takes."""
        return self._models[model].about()

    def plan(
        self,
        model: str,
        call: Mapping[str, Any],
        sizes: Mapping[str, list[tuple[int, int]]] | None = None,
        within: Budgets | None = None,
    ) -> dict[str, Any]:
        """What a call takes: bytes, seconds and the plan, or, with `fits` false, the least that would be enough.

        `sizes` are those of arguments that are pictures, width and height. Raises `ValueError` for a call that is not
        possible.
        """
        pictures = {name: [Image.new("RGB", size) for size in many] for name, many in (sizes or {}).items()}
        call = {**call, **self._models[model].pictures(pictures)}
        fit = self._models[model].prepared(call, self._least(within))
        try:
            plan = fit.choose()
        except BudgetError as refusal:
            return {"fits": False, **in_words(refusal)}
        return {"fits": True, **_in_numbers(plan)}

    def run(self, run: Run, told: Told) -> dict[str, Any]:
        """Make what a run asks for, and say what it took; what an earlier attempt has made is not made again."""
        model = self._models[run.model]
        pictures = {name: [Image.open(file) for file in files] for name, files in run.pictures.items()}
        call = {**run.call, **model.pictures(pictures)}
        sampler = call.pop(SAMPLER, None)
        if run.model in self._pipes:
            model.take_sampler(self._pipes[run.model], sampler)
        pipe = self._within(run, call)
        model.take_sampler(pipe, sampler)
        told(needs=_needs(lowtide.plan_of(pipe)))
        previews = Previews(self._notes / f"{run.model}.safetensors", model.channels(pipe))
        taken: list[list[dict[str, Any]]] = []
        own, along = run.missing()
        count = 1 if run.pictures or not own else self._together(run, call, [*own, *along])
        for begin in range(0, len(own), count):
            self._make(pipe, call, [*own, *along][begin : begin + count], told, previews)
            taken.append(stage_figures(pipe))
        plan = lowtide.plan_of(pipe)
        return {"files": run.made.names, **most_of(taken), **({} if plan is None else _in_numbers(plan))}

    def _make(
        self, pipe: Any, call: Mapping[str, Any], pictures: Sequence[Picture], told: Told, previews: Previews
    ) -> None:
        """Make these pictures in one call."""
        generators = [torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures]
        first = pictures[0]
        kept = first.made.kept(first.place)
        is_begun = any(kept.rglob("*.safetensors"))
        with unchecked() if is_begun else nullcontext(), KeptAnswers(pipe, kept) as answers:
            watch = _Watch(call, told, first.place, answers, previews)
            generator = generators[0] if len(pictures) == 1 else generators
            texts = [picture.texts for picture in pictures]
            output = pipe(**many(call, texts), **watch.arguments(pipe), generator=generator)
        watch.learn(write_all(output, [(picture.made, picture.place) for picture in pictures]))

    def _together(self, run: Run, call: Mapping[str, Any], missing: Sequence[Picture]) -> int:
        """How many of the pictures one call is to make, and the pipeline planned for that."""
        count = min(run.together, len(missing))
        alone = lowtide.plan_of(self._pipes[run.model])
        while count > 1 and alone is not None:
            pipe = self._in_share(run, many(call, [picture.texts for picture in missing[:count]]), run.share)
            plan = None if pipe is None else lowtide.plan_of(pipe)
            if plan is not None and plan.seconds < FASTER * count * alone.seconds:
                return count
            count //= 2
        if run.together > 1:
            self._within(run, call)
        return 1

    def _within(self, run: Run, call: Mapping[str, Any]) -> Any:
        """The model's pipeline, planned for this call beside the other models.

        It takes more than its share where that is too little, or gives other bits than were told; the other models rest
        where it would else. Raises `BudgetError` if that does not help beside other processes; alone it gives what it
        can, and says so.
        """
        for share in sorted({run.share, (1 + run.share) / 2, 1.0}):
            if (pipe := self._in_share(run, call, share)) is not None:
                return pipe
        for name in [name for name in self._pipes if name != run.model]:
            self._put_to_rest(name)
        if (pipe := self._in_share(run, call, 1.0)) is not None:
            return pipe
        most = self._least(run.within)
        if run.within is not None:
            raise BudgetError("It fits beside others in other ways alone.", "Try again.", most)
        return self._planned(run.model, call, most)

    def _in_share(self, run: Run, call: Mapping[str, Any], share: float) -> Any:
        """The same in a share of the budget; None if that is too little, or gives other bits than were told."""
        most = self._least(run.within)
        vram, ram = (None if each is None else int(each * share) for each in (most.vram, most.ram))
        try:
            pipe = self._planned(run.model, call, Budgets(vram, ram))
        except BudgetError:
            return None
        plan = lowtide.plan_of(pipe)
        return pipe if plan is None or run.exactness in (None, plan.exactness) else None

    def _planned(self, name: str, call: Mapping[str, Any], budgets: Budgets) -> Any:
        model = self._models[name]
        given = {"vram": budgets.vram, "ram": budgets.ram, "device": self._device}
        size = model.size(call)
        pipe = self._pipes.get(name)
        if self._last == (name, budgets, size):  # planned for this, and no other model has run since
            return pipe
        self._last = None
        if pipe is None:
            pipe = self._pipes[name] = lowtide.load(model.source, dtype=model.dtype or "auto", **given, **size)
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
        look_again()
        lowtide.fit(pipe, **given, **size)  # of one just loaded too: libraries that it needed are in memory now
        self._last = name, budgets, size
        return pipe

    def _put_to_rest(self, name: str) -> None:
        pipe, made_for = self._pipes[name], lowtide.plan_of(self._pipes[name])
        call = {} if made_for is None else dict(made_for.made_for)
        try:
            lowtide.fit(pipe, vram=1, ram=1, device=self._device, **call)
        except BudgetError as refusal:
            lowtide.fit(pipe, refusal.minimum.vram, refusal.minimum.ram, device=self._device, **call)

    def _least(self, within: Budgets | None) -> Budgets:
        """The budgets, or less, without what serving takes itself."""
        within = within or self.budgets
        pairs = ((within.vram, self.budgets.vram), (within.ram, self.budgets.ram))
        vram, ram = (min((each for each in pair if each is not None), default=None) for pair in pairs)
        return replace(self.budgets, vram=vram, ram=None if ram is None else max(1, ram - BESIDE))


class _Watch:
    """What a call tells of after each of its steps."""

    def __init__(
        self, call: Mapping[str, Any], told: Told, place: int, answers: KeptAnswers, previews: Previews
    ) -> None:
        self._size = call.get("width"), call.get("height")
        self._told, self._place, self._answers, self._previews = told, place, answers, previews
        self._latents: Any = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """For the call of a pipeline, if it tells of its steps."""
        return {"callback_on_step_end": self._after_step} if ServedModel.tells_of_steps(pipe) else {}

    def _after_step(self, pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._latents = tensors.get("latents")
        steps = getattr(pipe, "num_timesteps", None)
        preview = self._previews.png(self._latents, *self._size)
        self._told(picture=self._place, step=step + 1, steps=steps, new=self._answers.new, preview=preview)
        return {}

    def learn(self, picture: Image.Image | None) -> None:
        """Learn for the next previews."""
        if picture is not None:
            self._previews.learn(self._latents, picture)


def in_words(refusal: BudgetError) -> dict[str, Any]:
    """Why there is no plan, and the least that would be enough."""
    least = refusal.minimum
    return {"why": str(refusal), "minimum": {"vram": least.vram, "ram": least.ram}}


def _needs(plan: Plan | None) -> dict[str, int | None]:
    """The memory of each kind that a plan takes."""
    if plan is None:
        return {"vram": None, "ram": None}
    return {"vram": None if plan.device == "cpu" or plan.unified else plan.peak, "ram": plan.host_peak + BESIDE}


def _in_numbers(plan: Plan) -> dict[str, Any]:
    """A plan's bytes and seconds, and its text."""
    return {
        "peak": plan.peak + (BESIDE if plan.device == "cpu" else 0),
        "needs": _needs(plan),
        "seconds": plan.seconds,
        "exactness": plan.exactness,
        "stages": [{"name": stage.name, "peak": stage.peak, "seconds": stage.seconds} for stage in plan.stages],
        "plan": str(plan),
    }
