"""A plan: how a pipeline will use memory, what that is predicted to take, and the budgets it fits.

Sizes in bytes, times in seconds. Everything is frozen and free of torch. A plan can be saved as JSON and applied again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lowtide.casting.casting import NAMED_CASTINGS, PACKED
from lowtide.machine.device_names import KINDS
from lowtide.memory.rule import Rule
from lowtide.planning.explain import describe
from lowtide.planning.workload import BLENDED, WAYS, WHOLE
from lowtide.sizes import format_decimal

LOSSY = ("fp8", "int8", "int4", "blended_tiling")
"""Forms of weights and ways that change the result by more than rounding."""
ALLOWED = (*LOSSY, PACKED)
"""What `allow` may hold. Packed weights change the result by rounding, and take no less memory: they are faster."""


def check_allowed(allow: Collection[str]) -> None:
    """Raise `ValueError` for names that are not in `ALLOWED`."""
    unknown = sorted(set(allow) - set(ALLOWED))
    if isinstance(allow, str) or unknown:
        raise ValueError(f"allow={allow!r} is not possible: it may hold {', '.join(ALLOWED)}, as in allow=('fp8',).")


EQUAL_BITS, UP_TO_ROUNDING = "equal bits", "exact up to rounding"
"""How the results of plans that change nothing compare with those of a run without a plan."""


@dataclass(frozen=True)
class Budgets:
    """The most bytes that may be in use at once; None for no limit. On a CPU all memory is `ram`."""

    vram: int | None = None
    ram: int | None = None
    disk: int | None = None

    def __str__(self) -> str:
        given = [
            f"{field.name} {format_decimal(size)}"
            for field in fields(self)
            if (size := getattr(self, field.name)) is not None
        ]
        return ", ".join(given) or "no limit"


@dataclass(frozen=True)
class ComponentPlan:
    """How a component's weights rest and come to work: without a `rule` all of them stay on the device.

    `casting` names the form in which weights rest, if it is another: 8 or 4 bits, or packed. Of the component's
    `nbytes`, `kept` bytes stay on the device between calls: `kept_units` of the `units` into which the rule splits the
    weights.
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

    Bytes on the device at the peak: `weights` of all components, of which `mapped` are pages of files; `activations`;
    `workspace` of kernels; `carried`, tensors kept between calls; `base` of the process, of which PyTorch allocates
    `libraries` bytes on an accelerator; `slack` of the allocator.
    `host` is the peak of host memory, on a CPU the same peak. `disk` bytes of rows and spilled weights lie in temporary
    files. `seconds` is the time of the whole stage; `compute_seconds`, `link_seconds` and `disk_seconds` are what each
    part alone would take.
    In a `frugal` stage freed memory goes back to the system at once, which costs time, unless it fits into holes that
    an earlier stage left in the heap. In other stages a CPU's heap keeps some freed memory at hand.
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
    libraries: int = 0

    @property
    def peak(self) -> int:
        """Bytes in use on the device, at most."""
        return self.weights + self.allocated_beside_weights + self.base + self.slack

    @property
    def allocated_beside_weights(self) -> int:
        """Bytes of tensors other than weights."""
        return self.activations + self.workspace + self.carried

    @property
    def allocated(self) -> int:
        """Bytes that PyTorch allocates on the device, at most."""
        return self.weights - self.mapped + self.allocated_beside_weights + self.libraries

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch's allocator holds of an accelerator, at most: those and its slack."""
        return self.allocated + self.slack

    @property
    def bound(self) -> str:
        """What sets the pace: "compute", "link" or "disk"."""
        parts = {"compute": self.compute_seconds, "link": self.link_seconds, "disk": self.disk_seconds}
        return max(parts, key=lambda name: parts[name])

    @property
    def least_seconds(self) -> float:
        """The physical limit: the longest of computing, link and disk, if all three run at the same time."""
        return max(self.compute_seconds, self.link_seconds, self.disk_seconds)


@dataclass(frozen=True)
class Plan:
    """How a pipeline will use memory: a rule for each component, a way for each stage, and what they will take.

    Beside a GPU `pinned` bytes of host memory are pinned, of the `pinned_most` that may be. `why` gives the reasons in
    words. `unified` says that the device's memory is the host's. A plan can be printed, saved with `to_json`, and
    applied with `pipe.apply_plan`.
    """

    device: str
    dtype: str
    components: Mapping[str, ComponentPlan]
    stages: tuple[StagePlan, ...]
    budgets: Budgets = Budgets()
    allow: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    made_for: Mapping[str, Any] = field(default_factory=dict)
    unified: bool = False
    assumed: bool = False
    pinned: int = 0
    pinned_most: int = 0

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
        """How the result compares with that of a run without a plan: equal bits, exact up to rounding, or changed."""
        castings = {part.casting for part in self.components.values() if part.casting is not None}
        lossy = sorted(castings - {PACKED})
        ways = {stage.way for stage in self.stages}
        if BLENDED in ways:
            lossy.append("blended tiles")
        if lossy:
            return f"changed: {', '.join(lossy)}"
        return EQUAL_BITS if ways <= {WHOLE} and not castings else UP_TO_ROUNDING

    def way(self, stage: str) -> str:
        """The way of the stage with this name; "whole" for a stage that the plan does not have."""
        planned = self.stage(stage)
        return WHOLE if planned is None else planned.way

    def stage(self, name: str) -> StagePlan | None:
        """The plan of the stage with this name; None for a stage that the plan does not have."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def stages_of(self, component: str) -> list[StagePlan]:
        """The plans of the stages that call a component, in order."""
        return [stage for stage in self.stages if stage.component == component]

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        components = {
            name: {**asdict(part), "rule": None if part.rule is None else part.rule.to_dict()}
            for name, part in self.components.items()
        }
        content = {**asdict(self), "components": components, "stages": [asdict(stage) for stage in self.stages]}
        return {**content, "allow": list(self.allow), "why": list(self.why), "made_for": dict(self.made_for)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` wrote; raises `ValueError` for anything else."""
        try:
            components = {
                name: ComponentPlan(**{**part, "rule": None if part["rule"] is None else Rule.from_dict(part["rule"])})
                for name, part in content["components"].items()
            }
            stages = tuple(StagePlan(**stage) for stage in content["stages"])
            given = {**content, "components": components, "stages": stages, "budgets": Budgets(**content["budgets"])}
            plan = cls(**{**given, "allow": tuple(content["allow"]), "why": tuple(content["why"])})
            plan.check()
            return plan
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is not a plan that Lowtide wrote: {error}.") from error

    def check(self) -> None:
        """Raise `ValueError` for values that the planner never writes."""
        check_allowed(self.allow)
        sizes = [getattr(self.budgets, name) for name in ("vram", "ram", "disk")]
        is_sound = (
            self.device in ("cpu", *KINDS)
            and all(size is None or type(size) is int for size in sizes)
            and all(part.casting in (None, *NAMED_CASTINGS) for part in self.components.values())
            and all(stage.way in WAYS for stage in self.stages)
        )
        if not is_sound:
            raise ValueError(
                "This is not a plan that Lowtide wrote: its device, budgets, castings or ways are unknown."
            )

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `to_json` wrote; raises `ValueError` for anything else."""
        content = json.loads(text)
        if not isinstance(content, Mapping):
            raise ValueError(f"This is not a plan that Lowtide wrote: {text[:60]!r}.")
        return cls.from_dict(content)


class BudgetError(ValueError):
    """No plan fits the budgets; one fits `minimum`. `reason` is the message without the advice at its end."""

    def __init__(self, reason: str, advice: str, minimum: Budgets) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason = reason
        self.minimum = minimum
