"""The memory of a run over time as a picture, with the peaks that its plan predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.bench.plan_plot import budget_of
from lowtide.bench.plot_style import BLUE, FONT, GREY, ORANGE, RED, name_spans, new_figure, save, set_grid
from lowtide.measuring.timeline import StageMark, Timeline
from lowtide.planning.plan import Plan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = ("#f4f4f4", "#e9eef3")


def plot_timeline(timeline: Timeline, plan: Plan | None, path: Path) -> Path:
    """Write the picture to `path`; needs matplotlib. Without a plan it shows only what was measured.

    With a GPU it shows what PyTorch allocated there, and host memory in grey.
    """
    figure = new_figure(12, 5.4)
    axes = figure.add_subplot()
    set_grid(axes, "seconds", "memory, GB")
    outer = [stage for stage in timeline.stages if stage.depth == 0]
    axes.set_xlim(0, max([sample.seconds for sample in timeline.samples] + [stage.end for stage in outer]))
    _draw_bands(axes, outer)
    _draw_memory(axes, timeline)
    if plan is not None:
        _draw_plan(axes, outer, plan, on_gpu=timeline.has_device)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=6, frameon=False, fontsize=FONT)
    names = [(f"{stage.name} {_peak(stage, on_gpu=timeline.has_device)}", stage.start, stage.end) for stage in outer]
    name_spans(figure, axes, names, _top(timeline, outer, plan))
    return save(figure, path)


def _draw_bands(axes: Axes, stages: list[StageMark]) -> None:
    for index, stage in enumerate(stages):
        axes.axvspan(stage.start, stage.end, color=_SHADES[index % 2], zorder=0, linewidth=0)
        axes.axvline(stage.start, color="#cccccc", linewidth=0.5, zorder=0)


def _draw_memory(axes: Axes, timeline: Timeline) -> None:
    """Draw a line for each kind of memory that was sampled."""
    kinds = {
        "device": ("allocated on the GPU", BLUE, 1.4),
        "rss": (
            "host memory" if timeline.has_device else "resident memory",
            GREY if timeline.has_device else BLUE,
            1.4,
        ),
        "anonymous": ("anonymous", ORANGE, 0.9),
        "file": ("mapped files", "#3f8f4f", 0.9),
    }
    for kind, (label, color, width) in kinds.items():
        sampled = [sample for sample in timeline.samples if getattr(sample, kind) is not None]
        points = [(sample.seconds, getattr(sample, kind) / 1e9) for sample in sampled]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, label=label, zorder=3)


def _draw_plan(axes: Axes, stages: list[StageMark], plan: Plan, *, on_gpu: bool) -> None:
    """Draw the budget, and the predicted peak of each stage as a line over the time that the stage took."""
    budget = budget_of(plan)
    if budget is not None:
        axes.axhline(budget / 1e9, color=RED, linestyle="--", linewidth=1.2, label=f"budget {format_decimal(budget)}")
    predicted = {planned.name: planned.allocated if on_gpu else planned.peak for planned in plan.stages}
    label = "predicted peak"
    for stage in stages:
        if stage.name in predicted:
            height = predicted[stage.name] / 1e9
            axes.hlines(height, stage.start, stage.end, color="black", linewidth=1.2, label=label, zorder=4)
            label = "_"


def _peak(stage: StageMark, *, on_gpu: bool) -> str:
    return format_decimal(stage.peak_device or 0 if on_gpu else stage.peak_rss)


def _top(timeline: Timeline, stages: list[StageMark], plan: Plan | None) -> float:
    sizes = [stage.peak_rss for stage in stages] + [sample.rss for sample in timeline.samples]
    planned = [] if plan is None else [budget_of(plan) or 0, *(stage.peak for stage in plan.stages)]
    return max(sizes + planned) / 1e9
