"""The table as text: as markdown, for a terminal, and as JSON with every single run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.bench.figures import Summary, ratio, same_pictures, summaries
from lowtide.bench.machine import Machine
from lowtide.bench.one_run import GUIDANCE, WARM_UP_STEPS
from lowtide.bench.runs import Job, Options, Reading, Run
from lowtide.bench.techniques import ORIGINAL, OURS, TECHNIQUES
from lowtide.media.unfinished import whole_or_not
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
_PEER_COLUMNS = 4
_WIDE = 130  # columns of a terminal that has room for the whole table
Tell = Callable[[str], str]
"""Turns the reason of a failure into the text of its cell."""


@dataclass
class Report:
    """All that a table is made of; `runs` grows while the table is measured."""

    options: Options
    command: str
    machine: Machine
    runs: list[Run] = field(default_factory=list[Run])

    @property
    def reference(self) -> str:
        """The row with which all others are compared."""
        return ORIGINAL if ORIGINAL in self.options.rows else self.options.rows[0]

    def summaries(self) -> dict[Job, Summary]:
        """The summary of each job."""
        return summaries(self.runs)

    def a_reading(self) -> Reading | None:
        """The first reading; `None` before there is one."""
        return next((run.reading for run in self.runs if run.reading is not None), None)

    def versions(self) -> dict[str, str]:
        """Versions of all that was measured, by name."""
        versions: dict[str, str] = {}
        for run in self.runs:
            versions |= run.reading.versions if run.reading is not None else {}
        return versions


def headings(report: Report) -> list[str]:
    """The headings of the columns."""
    first = TECHNIQUES[report.reference].title
    own = ["technique", "latency, s", "speed-up", "peak memory, GB", f"of {first}"]
    own += ["reserved, GB", "host, GB"] if _with_device(report) else []
    peer = report.options.peer
    if peer is None:
        return own
    return [*own, f"{peer}: latency, s", f"{peer}: peak, GB", f"ours / {peer}: latency", f"ours / {peer}: peak"]


def cells(report: Report, row: str, tell: Tell) -> list[str]:
    """The cells of one row; `tell` gives the text of a cell whose run failed."""
    by_job = report.summaries()
    ours, first = by_job.get(Job(row, OURS)), by_job.get(Job(report.reference, OURS))
    own = [_latency(ours, tell), _times(ratio(_median(first), _median(ours))), _gigabytes(_peak(ours))]
    own.append(_share(ratio(_peak(ours), _peak(first))))
    if _with_device(report):
        own += [_gigabytes(ours.largest(name) if ours else None) for name in ("device_reserved", "peak_rss")]
    if report.options.peer is None:
        return [TECHNIQUES[row].title, *own]
    theirs = by_job.get(Job(row, report.options.peer))
    ratios = [ratio(_median(ours), _median(theirs)), ratio(_peak(ours), _peak(theirs))]
    peers = [_latency(theirs, tell), _gigabytes(_peak(theirs)), *(_plain(value) for value in ratios)]
    return [TECHNIQUES[row].title, *own, *peers]


def markdown_table(report: Report) -> str:
    """The table in markdown; the reason of a failure is in its cell."""
    columns = headings(report)
    rows = [cells(report, row, lambda reason: f"failed: {reason}") for row in report.options.rows]
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in [columns, rule, *rows])


def markdown(report: Report) -> str:
    """The whole file: title, how the table was measured, the table, the notes."""
    lines = [f"# {title(report)}", "", how(report), "", markdown_table(report), "", *notes(report), ""]
    return "\n".join(lines)


def rich_tables(report: Report, width: int) -> tuple[list[Table], list[str]]:
    """The table for a terminal of `width` columns, and the reasons of failures, which cells point to by number.

    In a narrow terminal the columns about the peer are a table of their own.
    """
    reasons: list[str] = []

    def tell(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"failed [{reasons.index(reason) + 1}]"

    lines = [headings(report), *(cells(report, row, tell) for row in report.options.rows)]
    tables = [_rich_table(part) for part in _parts(report, lines, width)]
    return tables, [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]


def _parts(report: Report, lines: list[list[str]], width: int) -> list[list[list[str]]]:
    if report.options.peer is None or width >= _WIDE:
        return [lines]
    return [[line[:-_PEER_COLUMNS] for line in lines], [[line[0], *line[-_PEER_COLUMNS:]] for line in lines]]


def _rich_table(lines: list[list[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    (first, *others), *rows = lines
    table = Table(box=box.SIMPLE)
    table.add_column(first, width=20)  # fixed: else words are broken to give room to the others
    for column in others:
        table.add_column(Text(column), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def title(report: Report) -> str:
    """One line: the model, the pictures, the device."""
    asked, reading = report.options, report.a_reading()
    folder = Path(asked.model)
    model = folder.resolve().name if folder.is_dir() else asked.model
    several = f"{asked.batch} pictures of " if asked.batch > 1 else ""
    where = report.machine.processor if reading is None or reading.gpu is None else reading.gpu
    steps = f"{asked.steps} DDIM step{'s' if asked.steps > 1 else ''}"
    return f"{model}, {several}{asked.width}x{asked.height}, {steps}, {asked.half}, {where}"


def how(report: Report) -> str:
    """How the table was measured, for a reader who has nothing but the table."""
    asked = report.options
    memory = (
        "what PyTorch allocated on the device in that call (in the next columns: what it reserved, and the process's "
        "resident memory)"
        if _with_device(report)
        else "the resident memory of the whole process, imports and loading included"
    )
    parts = [
        f"Latency is the time of one call of the whole pipeline, the median (min to max) of {asked.rounds} rounds. "
        "Every run is a fresh process, and all techniques run once in each round. A call of "
        f"{WARM_UP_STEPS} steps comes before the timed call. Guidance is {GUIDANCE:g}. Peak memory is {memory}: the "
        "largest of all rounds, in GB (10^9 bytes).",
        f"The speed-up is the median latency of `{report.reference}` (x1) divided by that of the technique.",
        "Half precision, channels last, traced UNet and memory-efficient attention are each on top of the technique "
        f"before; every other technique is on top of half precision ({asked.half}) alone. Nothing else is set in "
        "either library.",
    ]
    if report.reference != ORIGINAL:
        parts.insert(2, f"`{ORIGINAL}` was left out, so the speed-ups are not over float32.")
    return " ".join(parts)


def notes(report: Report) -> list[str]:
    """What else a reader must know: equal pictures, the command, the machine, the versions."""
    summaries = report.summaries()
    equal = same_pictures(summaries, Job("half", OURS))
    lines = (
        [f"the same pictures as `half`, byte for byte: {', '.join(job.technique for job in equal)}"] if equal else []
    )
    if any(not summary.failure and len(summary.readings) < report.options.rounds for summary in summaries.values()):
        lines.append(f"stopped early: not every technique has {report.options.rounds} runs")
    lost = [job for job, summary in summaries.items() if summary.failure and summary.readings]
    lines += [f"{job.technique} ({job.library}) failed in a later round: {summaries[job].failure}" for job in lost]
    machine, reading = report.machine, report.a_reading()
    gpu = f" ({reading.gpu})" if reading is not None and reading.gpu is not None else ""
    lines += [
        f"command: `{report.command}`",
        f"machine: {machine.processor}, {machine.processors:g} processors, {format_decimal(machine.memory)}, "
        f"{machine.system}; device {report.options.device}{gpu}",
        f"versions: {', '.join(f'{name} {version}' for name, version in report.versions().items())}",
    ]
    return [f"- {line}" for line in lines]


def write_json(report: Report, *, complete: bool) -> Path:
    """Write `table.json`; at any moment there is either the old file or the whole new one."""
    path, reading = report.options.out / "table.json", report.a_reading()
    content = {
        "complete": complete,
        "reference": report.reference,
        "command": report.command,
        "machine": {**asdict(report.machine), "gpu": None if reading is None else reading.gpu},
        "versions": report.versions(),
        "options": {**asdict(report.options), "out": str(report.options.out)},
        "runs": [_flat(run) for run in report.runs],
    }
    _replace(path, json.dumps(content, indent=1) + "\n")
    return path


def write_markdown(report: Report) -> Path:
    """Write `table.md`; it is replaced as a whole, as `table.json` is."""
    path = report.options.out / "table.md"
    _replace(path, markdown(report))
    return path


def _replace(path: Path, text: str) -> None:
    with whole_or_not(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _flat(run: Run) -> dict[str, Any]:
    return {"round": run.round, **asdict(run.job), "failure": run.failure, "reading": _maybe_dict(run.reading)}


def _maybe_dict(reading: Reading | None) -> dict[str, Any] | None:
    return None if reading is None else asdict(reading)


def _with_device(report: Report) -> bool:
    return any(run.reading is not None and run.reading.device_allocated is not None for run in report.runs)


def _median(summary: Summary | None) -> float | None:
    return None if summary is None else summary.latency


def _peak(summary: Summary | None) -> int | None:
    return None if summary is None else summary.peak


def _latency(summary: Summary | None, tell: Tell) -> str:
    if summary is None:
        return NOTHING
    if summary.latency is None:
        return tell(summary.failure or "not run")
    taken = summary.latencies()
    spread = f" ({min(taken):.2f} to {max(taken):.2f})" if len(taken) > 1 else ""
    return f"{summary.latency:.2f}{spread}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"x{value:.2f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _gigabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e9:.2f}"


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
