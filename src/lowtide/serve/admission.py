"""Who is let in: each request is planned, and what can never fit is refused with what would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lowtide.serve.limits import Limits
from lowtide.serve.problems import ProblemError
from lowtide.serve.requests import CallRequest
from lowtide.serve.worker_handle import AskedError, WorkerDiedError, WorkerHandle

SMALLER = (0.75, 0.5, 0.25)
"""Of a picture's sides that do not fit, the shares that are tried to say what would."""
MOST_PLANS = 1000
"""Plans that are remembered."""

Sizes = Mapping[str, Sequence[tuple[int, int]]]
"""Width and height of arguments that are pictures, by their names."""
Bytes = dict[str, int | None]
"""Of each kind of memory: vram and ram."""
Planning = Callable[[str], AbstractContextManager[Any]]
"""What is put around the making of a plan for a model."""


class Admission:
    """Plans the requests for `models` within `limits`, by the process `worker`."""

    def __init__(
        self, worker: WorkerHandle, models: Sequence[str], limits: Limits, planning: Planning = nullcontext
    ) -> None:
        self.models, self.limits = list(models), limits
        self._worker, self._planning = worker, planning
        self._plans: dict[Any, dict[str, Any]] = {}
        self._about: dict[str, dict[str, Any]] = {}

    async def plan(
        self, request: CallRequest, sizes: Sizes | None = None, within: Bytes | None = None
    ) -> dict[str, Any]:
        """What a request would take; see `lowtide.serve.engine.Engine.plan`. Raises `ProblemError`."""
        request.check(self.limits)
        model, call, sizes = self.model(request.model), request.call(), sizes or {}
        await self._check_names(model, call, sizes)
        return await self.planned(model, call, sizes, within)

    async def planned(
        self, model: str, call: Mapping[str, Any], sizes: Sizes, within: Bytes | None = None
    ) -> dict[str, Any]:
        """The same of a call that was let in before."""
        names = (await self.about(model))["planned_by"]
        settings = sorted(
            (name, value) for name, value in call.items() if (name in names if names else "prompt" not in name)
        )
        key = model, tuple(settings), str(sizes), str(within)
        if key not in self._plans:
            with self._planning(model):
                made = await self._asked("plan", model=model, call=call, sizes=sizes, within=within)
            if len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = made
        return self._plans[key]

    async def about(self, model: str) -> dict[str, Any]:
        """What a model makes, and what its call takes."""
        if model not in self._about:  # of others' models the source of their library is read
            self._about[model] = await self._asked("about", model=model)
        return self._about[model]

    def model(self, name: str | None) -> str:
        """The model that is meant; raises `ProblemError` for one that is not here."""
        if name is None:
            return self.models[0]
        if name not in self.models:
            raise ProblemError(404, f"There is no model {name!r} here.", possible=self.models)
        return name

    async def told(self, request: CallRequest, sizes: Sizes | None = None) -> dict[str, Any]:
        """The plan of a request, or why there is none, the least memory that would be enough, and a size that fits."""
        plan = await self.plan(request, sizes)
        return plan if plan["fits"] else {**plan, **await self._possible(request, sizes)}

    async def _possible(self, request: CallRequest, sizes: Sizes | None) -> dict[str, Any]:
        usual = (await self.about(self.model(request.model)))["size"] or {}
        width, height = request.width or usual.get("width"), request.height or usual.get("height")
        if not width or not height:
            return {}
        for share in SMALLER:
            sides = {"width": _side(width, share), "height": _side(height, share)}
            try:
                if (await self.plan(request.model_copy(update=sides), sizes))["fits"]:
                    return {"possible": sides}
            except ProblemError:
                continue
        return {}

    async def _check_names(self, model: str, call: Mapping[str, Any], sizes: Sizes) -> None:
        about = await self.about(model)
        unknown = sorted({*call, *sizes} - set(about["arguments"]))
        if unknown:
            raise ProblemError(422, f"{model} takes no {', '.join(unknown)}.", possible=sorted(about["arguments"]))
        sampler = call.get("sampler")
        if sampler is not None and sampler not in about["samplers"]:
            raise ProblemError(422, f"{model} has no sampler {sampler!r}.", possible=about["samplers"])

    async def _asked(self, do: str, **content: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self.limits.planning):
                await self._worker.wait_until_ready()
                return await self._worker.ask(do, **content)
        except AskedError as error:
            status = 422 if error.answer["kind"] in ("request", "budget") else 500
            raise ProblemError(status, str(error)) from error
        except (WorkerDiedError, TimeoutError) as error:
            reason = str(error) or "The process that computes is busy or starting."
            raise ProblemError(503, f"{reason} Try again.", {"Retry-After": "5"}) from error


def _side(side: int, share: float) -> int:
    return max(8, int(side * share) // 8 * 8)
