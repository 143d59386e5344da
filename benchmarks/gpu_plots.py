"""The plots of a run of `gpu.py`, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_report import Content, bound, results
from lowtide.bench.plot_style import new_figure, save, set_grid, set_log


def plots(content: Content, folder: Path) -> None:
    """Write those that there is something for."""
    for name, draw in {"steps": steps, "peers": peers, "predictions": predictions, "decodes": decodes}.items():
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
    points = [(name, row) for name, row in results(content, "steps") if name.startswith("flux ")]
    if not points:
        return None
    title = "A step of the network shaped as FLUX.1, and the memory that it takes"
    figure, axes = figure_with_axes(title, "peak of allocated memory, GB", "s a step")
    for name, row in points:
        own = name.split()[1].isdigit()
        place = (row["peak_allocated"] / 1e9, row["step"])
        axes.plot(*place, "o" if own else "x", color="tab:blue" if own else "tab:red")
        axes.annotate(name.partition(" ")[2], place, fontsize=8, xytext=(4, 4),
            textcoords="offset points")  # fmt: skip
    axes.set_ylim(bottom=0)
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
    rows = sorted((row["side"], row) for _, row in results(content, "decodes"))
    if not rows:
        return None
    figure, axes = figure_with_axes("Memory of a decode beside its weights", "side of the picture, pixels", "peak, GB")
    for way, label in (("whole", "whole"), ("exact", "row by row")):
        points = [(side, row[way]["peak"] / 1e9) for side, row in rows if "peak" in row[way]]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=label)
    set_log(axes.yaxis)
    axes.legend()
    return figure
