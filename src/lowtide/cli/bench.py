"""`lowtide bench table`: what each technique costs and saves, measured here."""

from __future__ import annotations

import functools
import importlib.util
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.bench.techniques import TECHNIQUES
from lowtide.cli.device_and_dtype import resolve_device
from lowtide.cli.errors import INTERRUPTED, RUN_FAILED, InputError, reported, tell
from lowtide.cli.pictures import prepare_folders
from lowtide.cli.request import check_device, check_prompt, check_steps, parse_size, resolve_model, seeds_from

if TYPE_CHECKING:
    from rich.progress import Progress

    from lowtide.bench.runs import Job, Options, Outcome
    from lowtide.bench.table_report import Report

PROMPT = "a photo of an astronaut riding a horse on mars"

app = typer.Typer(help="Measure Lowtide on this machine.", no_args_is_help=True)


class Half(StrEnum):
    """The half precisions that `--dtype` knows."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Peer(StrEnum):
    """The libraries that `--peer` knows."""

    DIFFUSERS = "diffusers"


@app.callback()
def _bench() -> None:
    """Measure Lowtide on this machine."""


@app.command()
def table(
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Model folder or Hub id.", show_default="the shipped model")
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, xpu, mps; cuda:N.")] = "auto",
    dtype: Annotated[
        Half,
        typer.Option(metavar="NAME", help="Half precision: float16, bfloat16; auto: bfloat16 on a CPU, else float16."),
    ] = Half.AUTO,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels, as 512 or 768x512.", show_default="the model's own")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="DDIM steps of the timed call.")] = 50,
    batch: Annotated[int, typer.Option(metavar="N", help="Pictures made at once.")] = 1,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to draw.")] = PROMPT,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds; in each, every technique runs once.")] = 3,
    rows: Annotated[
        str | None, typer.Option(metavar="NAMES", help=f"Some of: {', '.join(TECHNIQUES)}.", show_default="all")
    ] = None,
    peer: Annotated[
        Peer | None, typer.Option(metavar="NAME", help="Measure diffusers beside Lowtide.", show_default=False)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Weight files to take, such as fp16.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the pictures.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give a run up after this long.", show_default="never")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For table.md, table.json and table.png.")] = Path(
        "bench-table"
    ),
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Latency and peak memory of each technique, as a table and a plot.

    For example: lowtide bench table --rows original,half,group-block --steps 20

    Every run is a fresh process, and techniques take turns. What cannot be done here is told in its row.
    """
    with reported(debug=debug):
        from lowtide.bench.runs import Options

        chosen = parse_rows(rows)
        wanted = parse_size(size) if size is not None else None
        check_prompt(prompt)
        check_steps(steps)
        check_device(device)
        _check_counts(runs, batch, timeout)
        seeds_from(seed, 1)
        _check_peer(peer)
        folder = resolve_model(model)
        where = resolve_device(device)
        half = resolve_half(dtype, where.type)
        prepare_folders([out / "table.json"])
        width, height = _picture_size(folder, variant, wanted)
        options = Options(
            model=folder,
            variant=variant,
            device=str(where),
            half=half,
            width=width,
            height=height,
            steps=steps,
            batch=batch,
            prompt=prompt,
            rounds=runs,
            rows=chosen,
            peer=None if peer is None else peer.value,
            seed=seed,
            timeout=timeout,
            out=out,
        )
        run(options)


def parse_rows(text: str | None) -> tuple[str, ...]:
    """Names of rows from a list with commas: all where none is given. Raises `InputError` that lists them."""
    if text is None:
        return tuple(TECHNIQUES)
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    unknown = [name for name in names if name not in TECHNIQUES]
    if unknown or not names:
        asked = ", ".join(unknown) if unknown else "(empty)"
        raise InputError(f"--rows {asked}: possible are {', '.join(TECHNIQUES)}; give some, with commas between them.")
    return tuple(names)


def resolve_half(name: Half, device_type: str) -> str:
    """The name of the half precision: "auto" is bfloat16 on a CPU, which has no float16 of its own, else float16."""
    if name is Half.FLOAT16 and device_type == "cpu":
        tell("Warning: float16 is emulated on a CPU and very slow. Use --dtype bfloat16.")
    if name is not Half.AUTO:
        return name.value
    return "bfloat16" if device_type == "cpu" else "float16"


def run(options: Options) -> None:
    """Measure, then print and write; Ctrl-C ends the measuring and keeps what is there."""
    from lowtide.bench.machine import this_machine
    from lowtide.bench.table_report import Report

    report = Report(options, f"lowtide {shlex.join(sys.argv[1:])}", this_machine())
    stopped = False
    try:
        _measure(report)
    except KeyboardInterrupt:
        stopped = True
    if stopped and not report.runs:
        tell("Stopped before the first run ended; nothing is written.")
        raise typer.Exit(INTERRUPTED)
    _finish(report, complete=not stopped)
    if stopped:
        tell("Stopped. The table holds the runs that had ended.")
        raise typer.Exit(INTERRUPTED)
    if report.a_reading() is None:
        tell("Error: every run failed.")
        raise typer.Exit(RUN_FAILED)


def _check_counts(runs: int, batch: int, timeout: float | None) -> None:
    if runs < 1:
        raise InputError(f"--runs {runs}: at least one round is needed. 3 are usual.")
    if batch < 1:
        raise InputError(f"--batch {batch}: at least one picture must be made.")
    if timeout is not None and not timeout > 0:
        raise InputError(f"--timeout {timeout:g}: give seconds above 0, or leave it out.")


def _check_peer(peer: Peer | None) -> None:
    if peer is not None and importlib.util.find_spec(peer.value) is None:
        raise InputError(
            f"--peer {peer.value}: it is not installed here. Run {sys.executable} -m pip install {peer.value} "
            "accelerate, or leave --peer out."
        )


def _picture_size(model: str, variant: str | None, size: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height in pixels. The model's files are fetched here, so no run waits for the network.

    Raises `ValueError` and `OSError` for a model that cannot be loaded and a size that it cannot make.
    """
    from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, variant=variant, offload="model", offload_device="cpu")
    width, height = size or (None, None)
    height, width = pipe.image_size(height, width)
    return width, height


def _measure(report: Report) -> None:
    """Run all jobs in turn; `table.json` is written after each round."""
    from lowtide.bench.children import run_apart
    from lowtide.bench.runs import in_turn
    from lowtide.bench.table_report import write_json

    options = report.options
    jobs = options.jobs()
    rounds = f"{options.rounds} round{'s' if options.rounds > 1 else ''}"
    tell(f"{rounds} of {len(jobs)} runs, each in a fresh process, on {options.device}; half precision {options.half}.")
    with _progress() as progress:
        task = progress.add_task("starting", total=len(jobs) * options.rounds)
        save = functools.partial(write_json, report, complete=False)

        def run_one(job: Job) -> Outcome:
            progress.update(task, description=f"{job.technique} ({job.library})")
            return run_apart(options, job)

        for run in in_turn(jobs, options.rounds, run_one, save):
            report.runs.append(run)
            not_tried = options.rounds - run.round if run.failure else 0
            progress.advance(task, 1 + not_tried)
            if run.failure:
                told = f"{run.job.technique} ({run.job.library}) failed: {run.failure}"
                progress.console.print(told, markup=False, soft_wrap=True)


def _progress() -> Progress:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        refresh_per_second=1,  # drawing takes time from what is measured
    )


def _finish(report: Report, *, complete: bool) -> None:
    """Print the table on stdout and write the files; the paths go to stderr."""
    from lowtide.bench.plot import draw_plot
    from lowtide.bench.table_report import write_json, write_markdown

    paths = [write_json(report, complete=complete), write_markdown(report)]
    _print(report)
    if importlib.util.find_spec("matplotlib") is None:
        tell("No plot: it needs matplotlib. Run pip install 'lowtide[bench]'.")
    elif report.a_reading() is not None:
        paths.append(draw_plot(report))
    tell(f"Written: {', '.join(str(path) for path in paths)}")


def _print(report: Report) -> None:
    from rich.console import Console

    from lowtide.bench.table_report import markdown_table, rich_tables, title

    console = Console(highlight=False)
    if not console.is_terminal:
        typer.echo(markdown_table(report))
        return
    console.print(title(report), markup=False)
    tables, reasons = rich_tables(report, console.width)
    for table in tables:
        console.print(table)
    for reason in reasons:
        console.print(reason, markup=False, soft_wrap=True)
