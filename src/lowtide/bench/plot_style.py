"""What the pictures of plans and timelines share: figures, colours, grids, log axes, and stage names above a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, RED = "#0b5fa5", "#c2570c", "#3f8f4f", "#8a8a8a", "#b3202c"
FONT = 8.0
ROW = 0.06
"""The height of a row of names, as a share of the axes."""

Span = tuple[str, float, float]
"""A name, and the seconds at which its stretch of time begins and ends."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, `width` and `height` in inches, that opens no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the picture, as PNG unless the ending of the name says otherwise."""
    figure.savefig(path, format=path.suffix.lstrip(".").lower() or "png")
    return path


def set_grid(axes: Axes, x: str, y: str) -> None:
    """Label the axes, and draw thin grey lines behind everything."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def set_log(axis: Axis) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # pyright: ignore
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def name_spans(figure: Figure, axes: Axes, spans: Sequence[Span], top: float) -> None:
    """Write each name above `top` (GB) over the middle of its stretch, higher where it would touch another name.

    The y axis then goes from 0 to above the highest name.
    """
    figure.draw_without_rendering()  # lays the page out, so that the axes have their width
    rows = _rows(axes, spans)
    share = ROW * (max(rows, default=0) + 1.6)
    axes.set_ylim(0, top / (1 - share))
    for (name, start, end), row in zip(spans, rows, strict=True):
        height = top / (1 - share) * (1 - share + ROW * (row + 0.9))
        middle = (start + end) / 2
        axes.plot([middle, middle], [top, height - top * 0.035], color="#bbbbbb", linewidth=0.5, zorder=1)
        at, side = _inside(axes, middle, name)
        axes.text(at, height, name, fontsize=FONT, ha=side, va="center", color="#333333")


def _rows(axes: Axes, spans: Sequence[Span]) -> list[int]:
    """For each name the lowest row in which it touches no earlier name."""
    free_from: list[float] = []
    rows = []
    for name, start, end in spans:
        at, side = _inside(axes, (start + end) / 2, name)
        width = _width(axes, name)
        left = at - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * width
        row = next((row for row, edge in enumerate(free_from) if edge <= left), len(free_from))
        free_from[row : row + 1] = [left + width * 1.15]
        rows.append(row)
    return rows


def _inside(axes: Axes, middle: float, name: str) -> tuple[float, str]:
    """Where a name is written and how it is aligned to that place, so that all of it is inside the axes."""
    low, high = axes.get_xlim()
    half = _width(axes, name) / 2
    if middle - half < low:
        return low + half * 0.1, "left"
    return (high - half * 0.1, "right") if middle + half > high else (middle, "center")


def _width(axes: Axes, text: str) -> float:
    """The width of a text, in units of the x axis."""
    from matplotlib.textpath import TextPath

    low, high = axes.get_xlim()
    points = axes.get_window_extent().width * 72 / axes.figure.dpi
    return (TextPath((0, 0), text, size=FONT).get_extents().width + 6) * (high - low) / points
