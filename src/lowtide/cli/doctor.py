"""`lowtide doctor`: what this machine has, how fast it is, and what to use or install."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.errors import InputError, reported, tell
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from rich.table import Table

    from lowtide.cli.diagnosis import Diagnosis, Disk, Gpu, Memory, Planning, Processor

Rows = list[tuple[str, str]]


def doctor(
    folder: Annotated[Path, typer.Option(help="Where to measure the disk: put the folder of your models.")] = Path(),
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the rates for plans anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, bytes per second, FLOP/s.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Show devices, memory, link and disk rates, versions, and what to install."""
    from lowtide.cli.diagnosis import diagnose

    with reported(debug=debug):
        if not folder.is_dir():
            raise InputError(f"--folder {folder}: there is no such folder.")
        if not as_json:
            tell("Measuring; this takes a few seconds.")
        diagnosis = diagnose(folder, refresh=refresh)
        if as_json:
            typer.echo(json.dumps(asdict(diagnosis), indent=2))
        else:
            _print(diagnosis)


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for title, rows in _sections(diagnosis).items():
        console.print(title, style="bold")
        console.print(_grid([(f"  {name}", value) for name, value in rows], width=19))
    console.print("Advice", style="bold")
    console.print(_grid([("  •", advice) for advice in diagnosis.advice], width=3))


def _grid(rows: Rows, *, width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, min_width=width)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _sections(diagnosis: Diagnosis) -> dict[str, Rows]:
    software = [("lowtide", diagnosis.lowtide), ("Python", diagnosis.python), ("system", diagnosis.system)]
    packages = {**diagnosis.packages, **diagnosis.optional}
    return {
        "Software": software + [(name, version or "not installed") for name, version in packages.items()],
        "CPU": _processor_rows(diagnosis.processor),
        "Memory": _memory_rows(diagnosis.memory),
        "GPU": [row for gpu in diagnosis.gpus for row in _gpu_rows(gpu)]
        or [("CUDA", "no device that PyTorch can use")],
        "Disk": _disk_rows(diagnosis.disk),
        "Plans": _planning_rows(diagnosis.planning),
    }


def _processor_rows(cpu: Processor) -> Rows:
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in cpu.matmul.items())
    return [
        ("model", cpu.name),
        ("usable processors", f"{cpu.usable:g}"),
        ("features", ", ".join(cpu.features) or "none that we look for"),
        ("kernels", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in cpu.kernels.items()) or "not known"),
        ("matrix product", f"{rates} GFLOP/s"),
        ("a step takes", ", ".join(f"{name} {factor:.1f}×" for name, factor in cpu.times.items()) or "not measured"),
    ]


def _memory_rows(memory: Memory) -> Rows:
    limit = " (the container's limit)" if memory.limited_by_container else ""
    return [
        ("total", format_decimal(memory.total) + limit),
        ("available", format_decimal(memory.available)),
        ("copy rate", _rate(memory.copy_rate)),
    ]


def _whose(gpu: Gpu) -> str:
    return ", the host's: --ram is the budget of both" if gpu.shares_host_memory else ""


def _gpu_rows(gpu: Gpu) -> Rows:
    return [
        (gpu.device, gpu.name + ("" if gpu.capability is None else f", capability {gpu.capability}")),
        ("  memory", f"{format_decimal(gpu.total)}, {format_decimal(gpu.free)} free{_whose(gpu)}"),
        ("  link", f"{_rate(gpu.to_device)} to the device, {_rate(gpu.to_host)} back"),
    ]


def _disk_rows(disk: Disk) -> Rows:
    measured = [] if disk.read_rate is None else [_rate(disk.read_rate)]
    return [
        ("folder", disk.folder),
        ("free", format_decimal(disk.free)),
        ("read rate", "; ".join([*measured, *([disk.note] if disk.note else [])])),
        ("Hub cache", disk.hub_cache),
    ]


def _planning_rows(planning: Planning) -> Rows:
    rates = planning.rates
    kinds = {"convolution": rates.convolution, "product": rates.product, "attention": rates.attention}
    computing = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in kinds.items())
    ways = {"mapped" if rates.on_cpu else "link": rates.link, "copied": rates.converted, "disk": rates.disk}
    weights = ", ".join(f"{name} {_rate(rate)}" for name, rate in ways.items())
    return [
        (planning.dtype, f"{computing} GFLOP/s, other {_rate(rates.touched)}"),
        ("weights", f"{weights}, from 8 bits {_rate(rates.dequantized)}"),
        ("process itself", format_decimal(rates.base)),
        ("kept in", f"{planning.kept_in or 'no file, since there is no home folder'}; measured anew with --refresh"),
    ]


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"
