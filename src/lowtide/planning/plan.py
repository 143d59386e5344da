"""A plan: how a pipeline will use memory, what that is predicted to take, and the budgets it keeps to.

Sizes in bytes, times in seconds. Everything is frozen and free of torch; a plan is saved as JSON and put to work again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.memory.rule import Rule
from lowtide.planning.explain import describe
from lowtide.planning.workload import BLENDED, EXACT, EXACT_ON_DISK, WAYS, WHOLE
from lowtide.sizes import format_decimal

LOSSY = ("fp8", "int8", "blended_tiling")
"""What `allow` may hold: forms of weights and ways that change the result by more than rounding."""


def check_allowed(allow: Collection[str]) -> None:
    """Raise `ValueError` for anything that is no lossy form or way."""
    unknown = sorted(set(allow) - set(LOSSY))
    if isinstance(allow, str) or unknown:
        raise ValueError(f"allow={allow!r} is not possible: it may hold {', '.join(LOSSY)}, as in allow=('fp8',).")


@dataclass(frozen=True)
class Budgets:
    """Bytes that may be in use at once, at most; None for no limit. On a CPU `ram` is all there is."""

    vram: int | None = None
    ram: int | None = None
    disk: int | None = None

    def __str__(self) -> str:
        given = [
            f"{one.name} {format_decimal(size)}"
            for one in fields(self)
            if (size := getattr(self, one.name)) is not None
        ]
        return ", ".join(given) or "no limit"


@dataclass(frozen=True)
class ComponentPlan:
    """How a component's weights rest and come to work: without a `rule` all of them are on the device.

    `casting` names an 8-bit form that they rest in. Of `nbytes` in all, `kept` stay on the device between calls, and
    `kept_units` of the `units` that the rule makes.
    """

    rule: Rule | None = None
    casting: str | None = None
    nbytes: int = 0
    kept: int = 0
    units: int = 0
    kept_units: int = 0


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take under a plan.

    On the device at its peak: `weights` bytes of all components, of which `mapped` are pages of files, `activations`,
    `workspace`, `carried`, and `base` of the process and `slack` of the allocator. In host memory (the same memory on
    a CPU): `host`, everything. On disk: `disk`, rows and spilled weights. Seconds for all of the stage: `seconds`,
    and how long each part alone would take: computing, the link, the disk.
    In a `frugal` stage freed memory goes back to the system at once, at the cost of time, unless it fits into holes
    that an earlier stage left in the heap; elsewhere a CPU's heap keeps some of it at hand.
    """

    name: str
    component: str
    calls: int
    way: str
    weights: int
    mapped: int
    activations: int
    workspace: int
    carried: int
    base: int
    slack: int
    host: int
    disk: int
    seconds: float
    compute_seconds: float
    link_seconds: float
    disk_seconds: float
    frugal: bool = False

    @property
    def peak(self) -> int:
        """Bytes in use on the device, at most."""
        return self.weights + self.allocated_beside_weights + self.base + self.slack

    @property
    def allocated_beside_weights(self) -> int:
        """Bytes of tensors that are no weights."""
        return self.activations + self.workspace + self.carried

    @property
    def allocated(self) -> int:
        """Bytes that PyTorch allocates on the device, at most."""
        return self.weights - self.mapped + self.allocated_beside_weights

    @property
    def bound(self) -> str:
        """What sets the pace: "compute", "link" or "disk"."""
        parts = {"compute": self.compute_seconds, "link": self.link_seconds, "disk": self.disk_seconds}
        return max(parts, key=lambda name: parts[name])

    @property
    def least_seconds(self) -> float:
        """The physical limit: the slowest of computing, link and disk, all at once."""
        return max(self.compute_seconds, self.link_seconds, self.disk_seconds)


@dataclass(frozen=True)
class Plan:
    """How a pipeline will use memory: a rule a component, a way a stage, and what that is predicted to take.

    `why` says in words what each choice spared. Print it, save it with `to_json`, put it to work again
    with `pipe.apply_plan`.
    """

    device: str
    dtype: str
    components: Mapping[str, ComponentPlan]
    stages: tuple[StagePlan, ...]
    budgets: Budgets = Budgets()
    allow: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    made_for: Mapping[str, Any] = field(default_factory=dict)
    assumed: bool = False

    def __str__(self) -> str:
        return describe(self)

    @property
    def peak(self) -> int:
        """Bytes in use on the device, at most."""
        return max((stage.peak for stage in self.stages), default=0)

    @property
    def host_peak(self) -> int:
        """Bytes in use in host memory, at most; on a CPU the same as `peak`."""
        return max((stage.host for stage in self.stages), default=0)

    @property
    def disk(self) -> int:
        """Bytes written to temporary files, at most."""
        return max((stage.disk for stage in self.stages), default=0)

    @property
    def seconds(self) -> float:
        """How long a run will take, loading left out."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def exactness(self) -> str:
        """How the result compares with the plain run's: equal bits, up to rounding, or changed by what was allowed."""
        lossy = sorted({one.casting for one in self.components.values() if one.casting is not None})
        ways = {stage.way for stage in self.stages}
        if BLENDED in ways:
            lossy.append("blended tiles")
        if lossy:
            return f"changed: {', '.join(lossy)}"
        return "exact up to rounding" if ways & {EXACT, EXACT_ON_DISK} else "equal bits"

    def way(self, stage: str) -> str:
        """How the stage called so is gone through; "whole" for one that the plan does not know."""
        planned = self.stage(stage)
        return WHOLE if planned is None else planned.way

    def stage(self, name: str) -> StagePlan | None:
        """What the stage called so will take; None for one that the plan does not know."""
        return next((one for one in self.stages if one.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        components = {
            name: {**asdict(one), "rule": None if one.rule is None else one.rule.to_dict()}
            for name, one in self.components.items()
        }
        content = {**asdict(self), "components": components, "stages": [asdict(stage) for stage in self.stages]}
        return {**content, "allow": list(self.allow), "why": list(self.why), "made_for": dict(self.made_for)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` wrote; raises `ValueError` for anything else."""
        try:
            components = {
                name: ComponentPlan(**{**one, "rule": None if one["rule"] is None else Rule.from_dict(one["rule"])})
                for name, one in content["components"].items()
            }
            stages = tuple(StagePlan(**stage) for stage in content["stages"])
            given = {**content, "components": components, "stages": stages, "budgets": Budgets(**content["budgets"])}
            plan = cls(**{**given, "allow": tuple(content["allow"]), "why": tuple(content["why"])})
            plan.check()
            return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no plan that Lowtide wrote: {error}.") from error

    def check(self) -> None:
        """Raise `ValueError` for what no planner makes."""
        check_allowed(self.allow)
        sizes = [getattr(self.budgets, name) for name in ("vram", "ram", "disk")]
        right = self.device in ("cpu", "cuda") and all(one is None or type(one) is int for one in sizes)
        right &= all(one.casting in (None, *NAMED_CASTINGS) for one in self.components.values())
        if not right or not all(stage.way in WAYS for stage in self.stages):
            raise ValueError("This is no plan that Lowtide wrote: its device, budgets, castings or ways are unknown.")

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `to_json` wrote; raises `ValueError` for anything else."""
        content = json.loads(text)
        if not isinstance(content, Mapping):
            raise ValueError(f"This is no plan that Lowtide wrote: {text[:60]!r}.")
        return cls.from_dict(content)


class BudgetError(ValueError):
    """No plan fits the budgets; `minimum` would. `reason` is the message without its last part, what to try."""

    def __init__(self, reason: str, advice: str, minimum: Budgets) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason = reason
        self.minimum = minimum
