"""A run beside its plan: predicted and measured peak and time of each stage, and how far from the physical bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lowtide.measuring.meter import StageReading
from lowtide.measuring.transfers import Flow
from lowtide.planning.explain import seconds_in_words
from lowtide.planning.plan import Plan, StagePlan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.table import Table

BEATEN = 0.95
"""A ratio to the bound below this is no chance: no run is faster than what limits it, so the rates are wrong."""


@dataclass(frozen=True)
class StageReport:
    """One stage, gone through `times` times; seconds are of all of them together, sizes in bytes.

    The peaks are resident memory on a CPU, on a GPU what PyTorch allocates. `bound_seconds` is the least time that the
    machine needs, and `bound` names what needs it: "compute", "link" or "disk". `stalled` seconds computing waited for
    weights.
    """

    name: str
    times: int
    predicted_peak: int
    peak: int | None
    predicted_seconds: float
    seconds: float
    bound_seconds: float
    bound: str
    moved: int
    stalled: float

    @property
    def peak_difference(self) -> float | None:
        """How far the measured peak is from the predicted one, as a share of that."""
        return None if self.peak is None or not self.predicted_peak else self.peak / self.predicted_peak - 1

    @property
    def ratio_to_bound(self) -> float | None:
        """How many times the least seconds it took."""
        return self.seconds / self.bound_seconds if self.bound_seconds > 0 else None

    @property
    def stalled_share(self) -> float:
        """The share of the time that computing waited for weights."""
        return self.stalled / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        derived = ("peak_difference", "ratio_to_bound", "stalled_share")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class RunReport:
    """What a run took beside what its plan said; `degradations` says in words what did not go as planned.

    `unseen` bytes count against the budget and are in no peak here: a GPU's context.
    """

    device: str
    budget: int | None
    stages: tuple[StageReport, ...]
    degradations: tuple[str, ...] = ()
    unseen: int = 0

    @property
    def predicted_peak(self) -> int:
        """The highest predicted peak of the stages that ran."""
        return max((stage.predicted_peak for stage in self.stages), default=0)

    @property
    def within_budget(self) -> bool | None:
        """Whether the budget was kept; None without a budget or a measurement."""
        return None if self.budget is None or self.peak is None else self.peak + self.unseen <= self.budget

    @property
    def peak(self) -> int | None:
        """The highest measured peak; None if this machine cannot tell."""
        return max((stage.peak for stage in self.stages if stage.peak is not None), default=None)

    @property
    def predicted_seconds(self) -> float:
        """How long the plan said that it takes."""
        return sum(stage.predicted_seconds for stage in self.stages)

    @property
    def seconds(self) -> float:
        """How long the planned stages took together."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        sums = {
            name: getattr(self, name)
            for name in ("peak", "predicted_peak", "within_budget", "predicted_seconds", "seconds")
        }
        stages = [stage.to_dict() for stage in self.stages]
        return {**asdict(self), **sums, "stages": stages, "degradations": list(self.degradations)}

    def table(self) -> Table:
        """The report for a terminal, `degradations` left out."""
        return _table(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self.table())
        lines = [line.rstrip() for line in captured.get().strip("\n").splitlines()]
        return "\n".join([*lines, *(f"Not as planned: {degradation}" for degradation in self.degradations)])


def run_report(
    plan: Plan,
    readings: Sequence[StageReading],
    flows: Mapping[str, Flow] | None = None,
    degradations: Sequence[str] = (),
) -> RunReport:
    """Set what a meter read beside the plan; stages that the plan does not know are left out, as loading is.

    `flows` are a `FlowMeter`'s. A stage that was gone through several times, as for several pictures, is one row.
    Stages that took more than the budget are added to the `degradations`.
    """
    rows = [
        _stage_report(
            stage,
            [reading for reading in readings if reading.name == stage.name],
            (flows or {}).get(stage.name, Flow()),
        )
        for stage in plan.stages
    ]
    on_cpu = plan.device == "cpu"
    budget = plan.budgets.ram if on_cpu else plan.budgets.vram
    unseen = 0 if on_cpu else max((stage.base for stage in plan.stages), default=0)
    seen = tuple(row for row in rows if row.times)
    above = [_above(row, budget) for row in seen if budget is not None and (row.peak or 0) + unseen > budget]
    return RunReport(plan.device, budget, seen, (*degradations, *above), unseen)


def _above(stage: StageReport, budget: int) -> str:
    assert stage.peak is not None
    peak, limit, said = (format_decimal(size) for size in (stage.peak, budget, stage.predicted_peak))
    return f"{stage.name}: its peak of {peak} is above the budget of {limit}; predicted were {said}"


def _stage_report(stage: StagePlan, readings: Sequence[StageReading], flow: Flow) -> StageReport:
    on_gpu = any(reading.peak_device is not None for reading in readings)
    peaks = [reading.peak_device if on_gpu else reading.peak_rss for reading in readings]
    times = len(readings)
    return StageReport(
        name=stage.name,
        times=times,
        predicted_peak=stage.allocated if on_gpu else stage.peak,
        peak=max((peak for peak in peaks if peak is not None), default=None),
        predicted_seconds=stage.seconds * times,
        seconds=sum(reading.seconds for reading in readings),
        bound_seconds=stage.least_seconds * times,
        bound=stage.bound,
        moved=flow.moved,
        stalled=flow.stalled,
    )


def _table(report: RunReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, caption=_caption(report), caption_justify="left", padding=0, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("took, s", "planned", "of bound", "stall", "peak, GB", "planned", "moved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in report.stages:
        table.add_row(f"{stage.name} ×{stage.times}" if stage.times > 1 else stage.name, *_cells(stage))
    if len(report.stages) > 1:
        table.add_section()
        table.add_row("all", *_cells(_whole(report)))
    return table


def _whole(report: RunReport) -> StageReport:
    """All stages as one: seconds added, the highest peak; the bound is each stage's own, added up."""
    stages = report.stages
    return StageReport(
        name="all",
        times=1,
        predicted_peak=max(stage.predicted_peak for stage in stages),
        peak=report.peak,
        predicted_seconds=report.predicted_seconds,
        seconds=report.seconds,
        bound_seconds=sum(stage.bound_seconds for stage in stages),
        bound="",
        moved=sum(stage.moved for stage in stages),
        stalled=sum(stage.stalled for stage in stages),
    )


def _cells(stage: StageReport) -> list[str]:
    ratio = stage.ratio_to_bound
    return [
        _seconds(stage.seconds),
        _seconds(stage.predicted_seconds),
        "–" if ratio is None else f"{ratio:.2f}x {stage.bound}".rstrip(),
        f"{stage.stalled_share:.0%}",
        "–" if stage.peak is None else f"{stage.peak / 1e9:.2f}",
        f"{stage.predicted_peak / 1e9:.2f}",
        f"{stage.moved / 1e9:.2f}" if stage.moved else "–",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 1000 else f"{seconds:.0f}"


def _caption(report: RunReport) -> str:
    what = "resident memory" if report.device == "cpu" else "what PyTorch allocates on the GPU"
    least = "computing or the disk" if report.device == "cpu" else "computing, the link or the disk"
    said = f"Peaks are {what}; the bound is the least time that {least} needs."
    beaten = [stage.name for stage in report.stages if (stage.ratio_to_bound or 1) < BEATEN]
    if beaten:
        said += f"\nFaster than the bound in {', '.join(beaten)}: the plan's rates are too low for this machine."
    if report.peak is None or report.budget is None:
        return said
    held = "within" if report.within_budget else "above"
    context = f" and {format_decimal(report.unseen)} of the process's own" if report.unseen else ""
    taken = f"{seconds_in_words(report.seconds)} in all, at most {format_decimal(report.peak)}{context}"
    return f"{said}\n{taken}: {held} the budget of {format_decimal(report.budget)}."
