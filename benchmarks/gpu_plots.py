"""The plots of a run of `gpu.py`, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_report import GOAL, Content, Goal, bound, results
from lowtide.bench.plot import Dot, draw_labels
from lowtide.bench.plot_style import GREEN, new_figure, save, set_grid, set_log
from lowtide.bench.techniques import OURS


def plots(content: Content, folder: Path) -> None:
    """Write those that there is something for."""
    for name, draw in PLOTS.items():
        figure = draw(content)
        if figure is not None:
            save(figure, folder / f"{name}.png")


def figure_with_axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.set_title(title)
    set_grid(axes, x, y)
    return figure, axes


def steps(content: Content) -> Any:
    """The step over its bound, by the share of weights that stay."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, row in results(content, "steps"):
        network, _, share = name.partition(" ")
        least = bound(content, name, row)
        if share.isdigit() and least:
            lines.setdefault(network, []).append((int(share), row["step"] / least))
    if not lines:
        return None
    title = "A step over the longer of computing and copying alone"
    figure, axes = figure_with_axes(title, "weights that stay on the device, %", "times the bound")
    for network, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=network)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend()
    return figure


def peers(content: Content) -> Any:
    """The step by the peak of memory, of the network shaped as FLUX."""
    rows = [(name.partition(" ")[2], row) for name, row in results(content, "steps") if name.startswith("flux ")]
    title = "A step of the network shaped as FLUX.1, and the memory that it takes"
    dots = []
    for name, row in rows:
        share, _, level = name.partition(" ")
        is_ours = share.isdigit()
        dots.append(dot(f"{share} % stay {level}".strip() if is_ours else name, row, row["step"], is_ours=is_ours))
    return labelled(title, "s a step", dots)


def another_card(content: Content) -> Any:
    """A run as on an L20 by the peak of memory, beside the goal."""
    rows = [(name.partition(" ")[2], row) for name, row in results(content, "L20")]
    title = f"{GOAL.steps} steps of the network shaped as FLUX.1, as on an L20"
    return labelled(title, "s a run", [dot(name, row, row["run"], is_ours=name == OURS) for name, row in rows], GOAL)


def dot(name: str, row: dict[str, Any], seconds: float, *, is_ours: bool) -> Dot:
    return Dot(name, OURS if is_ours else "another library", row["peak_allocated"] / 1e9, seconds)


def labelled(title: str, y: str, dots: list[Dot], goal: Goal | None = None) -> Any:
    """Seconds by memory, a name at each dot, and lines at the goal, where there is one."""
    if not dots:
        return None
    figure, axes = figure_with_axes(title, "peak of allocated memory, GB", y)
    if goal is not None:
        memory = goal.memory / 1e9
        told = (
            f"goal: {goal.seconds:.0f} s within {memory:.1f} GB",
            f"published for another library: {goal.published:.0f} s",
        )
        axes.axhline(goal.seconds, color=GREEN, linewidth=0.8)
        axes.axvline(memory, color=GREEN, linewidth=0.8)
        dots = [*dots, Dot(told[0], OURS, memory, goal.seconds), Dot(told[1], "", memory, goal.published)]
    for own in dots:
        axes.plot(own.memory, own.latency, own.look[1], color=own.look[0])
    axes.set_xlim(0, 1.3 * max(own.memory for own in dots))
    axes.set_ylim(0, 1.15 * max(own.latency for own in dots))
    figure.draw_without_rendering()  # lays the page out, so that each dot has its place on it
    draw_labels(figure, axes, dots)
    return figure


def predictions(content: Content) -> Any:
    """Predicted over measured memory of calls."""
    rows = results(content, "calls")
    if not rows:
        return None
    figure, axes = figure_with_axes("Predicted over measured peaks of whole calls", "times the measured peak", "")
    places = range(len(rows))
    for kind, marker in (("allocated", "o"), ("reserved", "x")):
        shares = [row[f"predicted_{kind}"] / max(row[f"peak_{kind}"], 1) for _, row in rows]
        axes.plot(shares, places, marker, label=kind)
    axes.set_yticks(list(places), [name for name, _ in rows], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend()
    return figure


def decodes(content: Content) -> Any:
    """Memory of decodes, by the side of the picture."""
    rows = sorted(((row["side"], row) for _, row in results(content, "decodes")), key=lambda pair: pair[0])
    if not rows:
        return None
    figure, axes = figure_with_axes("Memory of a decode beside its weights", "side of the picture, pixels", "peak, GB")
    for way, label in (("whole", "whole"), ("exact", "row by row")):
        points = [(side, row[way]["peak"] / 1e9) for side, row in rows if "peak" in row[way]]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=label)
    set_log(axes.yaxis)
    axes.legend()
    return figure


PLOTS = {
    "steps": steps, "peers": peers, "another_card": another_card, "predictions": predictions, "decodes": decodes
}  # fmt: skip
