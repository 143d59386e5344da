"""A progress bar for the stages of a pipeline: an observer of `lowtide.stages`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass
class _Row:
    task: TaskID
    start: float
    steps: int | None
    step: int = 0
    earlier: int = 0
    """Steps of earlier visits."""
    seconds: float = 0.0
    """Seconds of earlier visits."""


class ProgressBar:
    """Shows the running stages on stderr: name, steps done, seconds per step.

    If stderr is not a terminal, each stage prints one plain line when it ends. `disable=True` shows nothing; for
    `desc`, `leave` and `file` see `bar_options`.
    The bar is drawn only after a step and when a stage begins or ends, so it needs no thread. `note` returns a text
    about the last step, which is shown in place of the bar and the time. With `totals`, each stage has one row for all
    of its visits, and the steps of all of them where they are in `totals`; the rows stay until `close`.
    """

    def __init__(
        self,
        *,
        disable: bool = False,
        note: Callable[[], str] | None = None,
        desc: str | None = None,
        leave: bool = True,
        file: IO[str] | None = None,
        totals: Mapping[str, int] | None = None,
    ) -> None:
        self.disable = disable
        self._before_names = f"{desc} " if desc else ""
        self._leave, self._file = leave, file
        self._note = note
        self._progress: Progress | None = None
        self._rows: list[_Row] = []
        self._totals = totals
        self._kept: dict[str, _Row] = {}

    def stage_started(self, name: str, steps: int | None) -> None:
        """Open a row for `name`."""
        if self._progress is None:
            self._progress = _new_progress(self.disable, self._note is None, self._leave, self._file)
            self._progress.start()
        row = self._kept.get(name) or self._new_row(self._progress, name, steps)
        row.start = time.perf_counter()
        self._rows.append(row)
        self._progress.refresh()

    def step_done(self, name: str, step: int) -> None:
        """Move the innermost row on."""
        row = self._rows[-1]
        row.step = row.earlier + step
        self._show(row, completed=row.step)

    def stage_finished(self, name: str) -> None:
        """Close the row; after the outermost stage the bar stays on the screen as it is."""
        row = self._rows.pop() if self._rows else None  # None: an interrupt came before there was one
        if row is not None and (row.steps is None or self._note is not None):
            done = max(row.step, 1)
            self._show(row, completed=done, total=row.steps or done, ended=True)
        if row is not None:
            row.earlier, row.seconds = row.step, row.seconds + time.perf_counter() - row.start
        if not self._rows and self._totals is None:
            self.close()

    def close(self) -> None:
        """Leave the rows on the screen as they are."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._kept = {}

    def _new_row(self, progress: Progress, name: str, steps: int | None) -> _Row:
        total = steps if self._totals is None else self._totals.get(name, steps)
        title = "  " * len(self._rows) + self._before_names + name
        row = _Row(progress.add_task(title, total=total, steps=f"0/{total}" if total else "", pace=""), 0.0, total)
        if self._totals is not None:
            self._kept[name] = row
        return row

    def _show(self, row: _Row, *, completed: int, total: int | None = None, ended: bool = False) -> None:
        assert self._progress is not None
        of_all = f"/{row.steps}" if row.steps else ""
        pace = self._pace(row, ended=ended) if row.step else ""
        steps = f"{row.step}{of_all}" if row.step else ""
        self._progress.update(row.task, completed=completed, total=total or row.steps, steps=steps, pace=pace)
        self._progress.refresh()

    def _pace(self, row: _Row, *, ended: bool) -> str:
        note = "" if self._note is None or ended else self._note()
        passed = row.seconds + time.perf_counter() - row.start
        in_all = "" if self._note is None else f", {passed:.1f} s"
        return note or f"{passed / row.step:.2f} s/it{in_all}"


LOOKS = (
    "total", "ncols", "mininterval", "maxinterval", "miniters", "ascii", "unit", "unit_scale", "dynamic_ncols",
    "smoothing", "bar_format", "initial", "position", "postfix", "unit_divisor", "write_bytes", "lock_args", "nrows",
    "colour", "delay", "gui",
)  # fmt: skip
"""Keywords of tqdm, the peer's progress bar, about the looks of its bar; ours has its own."""


def bar_options(**options: Any) -> dict[str, Any]:
    """The options of `ProgressBar` among the keywords of tqdm; those about looks have no effect.

    `disable` shows nothing, `desc` stands before the names of stages, `leave` False wipes the bar when a stage ends,
    `file` is where it is shown. Raises `TypeError` for other names.
    """
    unknown = sorted(set(options) - {*LOOKS, "disable", "desc", "leave", "file"})
    if unknown:
        raise TypeError(f"set_progress_bar_config takes no {unknown}; it takes disable, desc, leave and file.")
    own = {name: value for name, value in options.items() if name not in LOOKS}
    return {**own, "disable": bool(own.get("disable", False)), "leave": own.get("leave", True) is not False}


def _new_progress(disable: bool, with_bar: bool, leave: bool, file: IO[str] | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:<14}", markup=False),
        *([BarColumn(bar_width=24)] if with_bar else []),
        TextColumn("{task.fields[steps]:>7}", markup=False),
        TextColumn("{task.fields[pace]:>11}", markup=False),
        *([TimeElapsedColumn()] if with_bar else []),
        console=Console(stderr=True) if file is None else Console(file=file),
        transient=not leave,
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),  # else the prints of a program would end up on stderr
        disable=disable,
    )
