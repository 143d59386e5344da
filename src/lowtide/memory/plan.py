"""The nouns of planning: what a run takes, what a machine gives, and the plan between the two.

Sizes in bytes, times in seconds, work in floating-point operations. Everything is frozen and free of torch; a plan is
saved as JSON and put to work again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lowtide.memory.forms import Level, Rule
from lowtide.sizes import format_bytes

WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED = "whole", "sliced", "exact", "exact on disk", "blended"
WAYS = (WHOLE, SLICED, EXACT, EXACT_ON_DISK, BLENDED)
"""The ways to go through a stage: at once, one picture of a batch at a time, row by row with the finished rows in
memory or in a file, in blended tiles."""
LOSSY = ("fp8", "int8", "blended_tiling")
"""What `allow` may hold: forms of weights and ways that change the result by more than rounding."""


@dataclass(frozen=True)
class Work:
    """What is computed: operations of convolutions, matrix products and attention; bytes all the rest reads and writes.

    A multiplication and an addition are two operations. `kernels` counts the calls of kernels of every kind.
    `channels_last` are convolutions of maps laid out so, which `convolution` leaves out: a CPU is faster at them.
    """

    convolution: float = 0.0
    product: float = 0.0
    attention: float = 0.0
    touched: float = 0.0
    kernels: int = 0
    channels_last: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.convolution + other.convolution,
            self.product + other.product,
            self.attention + other.attention,
            self.touched + other.touched,
            self.kernels + other.kernels,
            self.channels_last + other.channels_last,
        )

    def times(self, count: float) -> Work:
        """So much of it."""
        return Work(
            self.convolution * count,
            self.product * count,
            self.attention * count,
            self.touched * count,
            int(self.kernels * count),
            self.channels_last * count,
        )


@dataclass(frozen=True)
class Call:
    """One call of a component on one shape of input, its weights left out.

    `peak` bytes of tensors are alive at once, at most: inputs and outputs, and `workspace` bytes of kernels' own
    memory among them. `result` bytes are left when it ends; `stored` bytes of rows lie in a file in between.
    """

    peak: int
    workspace: int
    result: int
    work: Work
    stored: int = 0


@dataclass(frozen=True)
class UnitSize:
    """What comes to the device at once: `nbytes` aligned bytes of weights as they are computed with.

    `resting` bytes of them lie in the file. A `mapped` unit can be computed with where it lies there, on a CPU. Units
    of several `modules` and those that stand `aside` count as `lowtide.memory.stream.Stream` counts them. `work` is
    what one call of the component computes with these weights, `leaf` its largest single layer's bytes.
    """

    name: str
    nbytes: int
    resting: int
    mapped: bool = True
    modules: int = 1
    aside: bool = False
    work: Work = field(default_factory=Work)
    leaf: int = 0


@dataclass(frozen=True)
class Component:
    """A network's weights, split in units for each level, in the order in which they are called.

    `castings` holds the same for weights that rest in 8 bits, by the casting's name. `in_file` tells whether the
    weights lie in files that they can be read from again.
    """

    name: str
    units: Mapping[Level, tuple[UnitSize, ...]]
    castings: Mapping[str, Mapping[Level, tuple[UnitSize, ...]]] = field(default_factory=dict)
    in_file: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are computed with."""
        return sum(unit.nbytes for unit in self.units[Level.WHOLE])


@dataclass(frozen=True)
class Stage:
    """A named stretch of a run, in which one component is called `calls` times.

    `ways` are the calls that it can be made of, by the names in `WAYS`. `carried` bytes are alive during all of it and
    in no call's peak: latents, embeddings, the scheduler's history, pictures made so far.
    """

    name: str
    component: str
    calls: int
    ways: Mapping[str, Call]
    carried: int = 0


@dataclass(frozen=True)
class Workload:
    """A run: its stages in order and the components in use; `made_for` says what was asked, such as the size."""

    components: Mapping[str, Component]
    stages: tuple[Stage, ...]
    dtype: str
    made_for: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, for one device and dtype.

    Operations of `convolution`, `product` and `attention`; bytes `touched`; seconds a `kernel` takes to begin. Bytes
    that come to the device a second: over the `link` from host memory (on a CPU: by mapping pages that are in memory),
    `converted` where the dtype changes or bytes are copied, and from the `disk`. `cache` bytes of files stay in the
    system's memory, so that they are read from the disk once. `base` bytes are taken by the process itself on the host,
    `device_base` on the device, before anything is loaded; `slack` is the share of activations that an allocator takes
    on top. `dequantized` bytes of working numbers a second are made of 8-bit ones. For each second of loading beside
    computing, computing loses `contention` of a second: a CPU's reader takes time from it. `channels_last` are
    operations of convolutions of such maps, 0 where they are as fast as others. `assumed` where these are usual
    figures, not measured ones.
    """

    device: str
    convolution: float
    product: float
    attention: float
    touched: float
    kernel: float
    link: float
    converted: float
    disk: float
    cache: int
    base: int
    device_base: int = 0
    slack: float = 0.0
    dequantized: float = 1e10
    contention: float = 0.0
    channels_last: float = 0.0
    assumed: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.device == "cpu"

    def seconds(self, work: Work) -> float:
        """How long computing takes, with the weights at hand."""
        return (
            work.convolution / self.convolution
            + work.channels_last / (self.channels_last or self.convolution)
            + work.product / self.product
            + work.attention / self.attention
            + work.touched / self.touched
            + work.kernels * self.kernel
        )


@dataclass(frozen=True)
class Budgets:
    """Bytes that may be in use at once, at most; None for no limit. On a CPU `ram` is all there is."""

    vram: int | None = None
    ram: int | None = None
    disk: int | None = None

    def __str__(self) -> str:
        given = [
            f"{one.name} {format_bytes(size)}" for one in fields(self) if (size := getattr(self, one.name)) is not None
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

    `why` says in words what each choice spared. Print it, save it with `to_json`, put it to work again with
    `pipe.apply_plan`.
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
        from lowtide.memory.words import describe

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
        return next((one.way for one in self.stages if one.name == stage), WHOLE)

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
            return cls(**{**given, "allow": tuple(content["allow"]), "why": tuple(content["why"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no plan that Lowtide wrote: {error}.") from error

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
    """No plan fits the budgets; `minimum` would."""

    def __init__(self, message: str, minimum: Budgets) -> None:
        super().__init__(message)
        self.minimum = minimum
