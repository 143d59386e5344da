"""The entry point of the command `lowtide`."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

import lowtide
from lowtide.cli import bench
from lowtide.cli.decode import decode
from lowtide.cli.doctor import doctor
from lowtide.cli.errors import tell
from lowtide.cli.generate import generate
from lowtide.cli.plan_command import plan
from lowtide.cli.serve import serve
from lowtide.cli.terminal import make_readable

app = typer.Typer(
    name="lowtide",
    help="Diffusion models in the memory you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(decode)
app.command()(plan)
app.command()(doctor)
app.command()(serve)
app.add_typer(bench.app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lowtide {lowtide.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Diffusion models in the memory you have."""


def main() -> None:
    """Run the command line."""
    make_readable()
    warnings.showwarning = _show_warning
    app()


def _show_warning(message: Warning | str, *_where: object) -> None:
    """Warnings of the library, said as the rest is said: without the source line."""
    tell(f"Warning: {' '.join(str(message).split())}")
