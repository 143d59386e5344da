"""The table as a picture: latency over peak memory, with a labelled dot for each technique."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.bench.figures import undominated
from lowtide.bench.labels import Box, placed
from lowtide.bench.table_report import Report, title
from lowtide.bench.techniques import OURS, TECHNIQUES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_OURS = ("#0b5fa5", "o")
_THEIRS = ("#c2570c", "s")
_LOG_FROM = 5.0
_FONT = 8.0
_MARGIN = 0.15


@dataclass(frozen=True)
class Dot:
    """One technique in one library: its peak memory in GB, its latency in seconds."""

    label: str
    library: str
    memory: float
    latency: float

    @property
    def look(self) -> tuple[str, str]:
        """Its colour and its marker."""
        return _OURS if self.library == OURS else _THEIRS


def dots(report: Report) -> list[Dot]:
    """A dot for each job that has both a latency and a peak."""
    plotted: list[Dot] = []
    for job, summary in report.summaries().items():
        if summary.latency is not None and summary.peak is not None:
            label = TECHNIQUES[job.technique].title
            plotted.append(Dot(label, job.library, summary.peak / 1e9, summary.latency))
    return plotted


def draw_plot(report: Report) -> Path:
    """Write `table.png` and return its path; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plotted = dots(report)
    _set_axes(axes, plotted)
    axes.set_title("\n".join(textwrap.wrap(title(report), 100)), fontsize=11, loc="left")
    _draw_dots(axes, plotted)
    figure.draw_without_rendering()  # lays the page out, so that each dot has its place on it
    draw_labels(figure, axes, plotted)
    path = report.options.out / "table.png"
    figure.savefig(path)
    return path


def _set_axes(axes: Axes, plotted: Sequence[Dot]) -> None:
    axes.set_xlabel("peak memory, GB")
    axes.set_ylabel("latency, s")
    axes.grid(visible=True, which="both", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(_MARGIN)
    if _is_wide([dot.memory for dot in plotted]):
        axes.set_xscale("log")
        _set_log_ticks(axes.xaxis)
    if _is_wide([dot.latency for dot in plotted]):
        axes.set_yscale("log")
        _set_log_ticks(axes.yaxis)


def _is_wide(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _set_log_ticks(axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_dots(axes: Axes, plotted: Sequence[Dot]) -> None:
    """Draw the dots of each library, and the line through the dots that no other dot beats."""
    for library in dict.fromkeys(dot.library for dot in plotted):
        own = [dot for dot in plotted if dot.library == library]
        x, y = [dot.memory for dot in own], [dot.latency for dot in own]
        color, marker = own[0].look
        axes.scatter(x, y, s=30, c=color, marker=marker, label=library, zorder=3, edgecolors="white", linewidths=0.6)
    best = [plotted[index] for index in undominated([(dot.memory, dot.latency) for dot in plotted])]
    x, y = [dot.memory for dot in best], [dot.latency for dot in best]
    axes.plot(x, y, "--", color="#555555", linewidth=1.0, zorder=2, label="no other is both faster and smaller")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)


def draw_labels(figure: Figure, axes: Axes, plotted: Sequence[Dot]) -> None:
    """Draw a label beside each dot, with a thin lead to the dot."""
    points = [_in_points(figure, *axes.transData.transform((dot.memory, dot.latency))) for dot in plotted]
    corners = axes.get_window_extent()
    page = Box(*_in_points(figure, corners.x0, corners.y0), *_in_points(figure, corners.x1, corners.y1))
    sizes = [_text_size(dot.label) for dot in plotted]
    for dot, point, box in zip(plotted, points, placed(points, sizes, page), strict=True):
        _draw_label(axes, dot, point, box)


def _draw_label(axes: Axes, dot: Dot, point: tuple[float, float], box: Box) -> None:
    from matplotlib.patheffects import withStroke

    color, _ = dot.look
    at = (dot.memory, dot.latency)
    end = box.nearest(*point)
    lead = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    axes.annotate("", at, (end[0] - point[0], end[1] - point[1]), textcoords="offset points", arrowprops=lead)
    middle = ((box.left + box.right) / 2 - point[0], (box.bottom + box.top) / 2 - point[1])
    text = axes.annotate(dot.label, at, middle, textcoords="offset points", fontsize=_FONT, color=color, zorder=4)
    text.set(ha="center", va="center", path_effects=[withStroke(linewidth=2.5, foreground="white")])


def _in_points(figure: Figure, x_pixels: float, y_pixels: float) -> tuple[float, float]:
    return x_pixels * 72 / figure.dpi, y_pixels * 72 / figure.dpi


def _text_size(text: str) -> tuple[float, float]:
    """Width and height in points, with a margin."""
    from matplotlib.textpath import TextPath

    extent = TextPath((0, 0), text, size=_FONT).get_extents()
    return extent.width * 1.05 + 4, _FONT * 1.5
