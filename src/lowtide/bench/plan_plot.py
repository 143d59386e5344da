"""A plan as a picture: the memory of each stage over the run, and the seconds of the best plan for every budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.bench.plot_style import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    ORANGE,
    RED,
    name_spans,
    new_figure,
    save,
    set_grid,
    set_log,
)
from lowtide.planning.explain import asked_in_words, seconds_in_words
from lowtide.planning.plan import Plan, StagePlan
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = (("weights", BLUE), ("activations", ORANGE), ("workspace", "#e3a857"), ("other", "#b9b9b9"))
_LOOKS = {"equal bits": (BLUE, "o"), "exact up to rounding": (GREEN, "s"), "changed": (ORANGE, "D")}
_WIDE = 5.0
_FEW = 25


def plot_plan(plan: Plan, curve: Sequence[tuple[int, Plan]], path: Path) -> Path:
    """Write the picture to `path`; needs matplotlib. `curve` has budgets in bytes, each with its best plan."""
    figure = new_figure(13, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_run(figure, left, plan)
    _draw_curve(right, plan, sorted(curve, key=lambda point: point[0]))
    return save(figure, path)


def _draw_run(figure: Figure, axes: Axes, plan: Plan) -> None:
    where = "memory" if plan.device == "cpu" else "GPU memory"
    set_grid(axes, "predicted seconds", f"predicted {where}, GB")
    axes.set_title(_title(plan), fontsize=10, loc="left")
    ends = list(accumulate(stage.seconds for stage in plan.stages))
    starts = [0.0, *ends][: len(ends)]
    for stage, start in zip(plan.stages, starts, strict=True):
        _draw_stage(axes, stage, start)
    budget = budget_of(plan)
    axes.set_xlim(0, ends[-1])
    if budget is not None:
        axes.axhline(budget / 1e9, color=RED, linestyle="--", linewidth=1.2, label=f"budget {format_decimal(budget)}")
    top = max(plan.peak, budget or 0) / 1e9
    spans = [
        (f"{stage.name} {format_decimal(stage.peak)}", start, end)
        for stage, start, end in zip(plan.stages, starts, ends, strict=True)
    ]
    _add_legend(axes)
    name_spans(figure, axes, spans, top)


def _draw_stage(axes: Axes, stage: StagePlan, start: float) -> None:
    """Draw the parts of a stage on top of each other; a thin edge shows a stage that is too short to be seen."""
    sizes = parts_of(stage)
    bottom = 0.0
    for name, color in _PARTS:
        height = sizes[name] / 1e9
        axes.bar(start, height, stage.seconds, bottom, align="edge", color=color, edgecolor="white", linewidth=0.3)
        bottom += height
    axes.plot([start, start], [0, bottom], color="#555555", linewidth=0.6)


def parts_of(stage: StagePlan) -> dict[str, int]:
    """What a stage's peak is made of, in bytes."""
    other = stage.carried + stage.base + stage.slack
    return {"weights": stage.weights, "activations": stage.activations, "workspace": stage.workspace, "other": other}


def budget_of(plan: Plan) -> int | None:
    """The budget of the device's memory, if there is one."""
    return plan.budgets.ram if plan.device == "cpu" else plan.budgets.vram


def _add_legend(axes: Axes) -> None:
    from matplotlib.patches import Patch

    labels = {"other": "other: the process, latents, the allocator"}
    parts = [Patch(facecolor=color, label=labels.get(name, name)) for name, color in _PARTS]
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "frameon": False, "fontsize": FONT}
    axes.legend(handles=[*parts, *lines], ncols=5, columnspacing=1.2, handlelength=1.4, **place)


def _title(plan: Plan) -> str:
    host = "" if plan.device == "cpu" else f", host {format_decimal(plan.host_peak)}"
    rates = ", assumed rates" if plan.assumed else ""
    peak = f"peak {format_decimal(plan.peak)}{host}, {seconds_in_words(plan.seconds)}, {plan.exactness}"
    return f"{plan.device}, {plan.dtype}{rates}: {asked_in_words(plan)}\n{peak}"


def _draw_curve(axes: Axes, plan: Plan, curve: Sequence[tuple[int, Plan]]) -> None:
    """Draw seconds over the budget: a dot for each plan, with a colour and a marker for each kind of exactness."""
    where = "memory" if plan.device == "cpu" else "GPU memory"
    set_grid(axes, f"budget of {where}, GB", "predicted seconds")
    axes.set_title("The best plan for every budget", fontsize=10, loc="left")
    axes.margins(0.1)
    points = [(budget / 1e9, best.seconds) for budget, best in curve]
    beyond = max(budget_of(plan) or 0, curve[-1][0]) * 1.05 / 1e9  # from the last budget on, its plan stays the best
    line = [*points, (beyond, points[-1][1])]
    axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=GREY, linewidth=1.0, zorder=2)
    for kind, (color, marker) in _LOOKS.items():
        own = [point for point, (_, best) in zip(points, curve, strict=True) if best.exactness.split(":")[0] == kind]
        if own:
            size = 26 if len(points) <= _FEW else 9
            axes.scatter(*zip(*own, strict=True), s=size, c=color, marker=marker, label=kind, zorder=3)
    _mark_chosen(axes, plan, points)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "frameon": False, "fontsize": FONT}
    axes.legend(ncols=4, columnspacing=1.2, **place)


def _mark_chosen(axes: Axes, plan: Plan, points: Sequence[tuple[float, float]]) -> None:
    """Draw a ring around the chosen plan and the budget as a line; make axes logarithmic where values differ a lot."""
    chosen = (plan.peak / 1e9, plan.seconds)
    axes.scatter(*chosen, s=150, facecolors="none", edgecolors=RED, linewidths=1.6, zorder=4, label="the chosen plan")
    budget = budget_of(plan)
    if budget is not None:
        axes.axvline(budget / 1e9, color=RED, linestyle="--", linewidth=1.0, label=f"budget {format_decimal(budget)}")
    all_points = [*points, chosen]
    seconds = [y for _, y in all_points]
    for axis, values in ((axes.xaxis, [x for x, _ in all_points]), (axes.yaxis, seconds)):
        if min(values) > 0 and max(values) / min(values) > _WIDE:
            set_log(axis)
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, max(seconds) * 1.15)  # from 0, so that a small difference looks small
