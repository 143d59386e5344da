"""`lowtide decode`: go on from latents that `lowtide generate` kept when decoding them failed or was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.budget_options import Allow, Budget, budget_from
from lowtide.cli.errors import InputError, reported
from lowtide.cli.generate import run
from lowtide.cli.request import Casting, Decode, Offload, Request, request_from, resolve_model


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="The file that was named.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Another .png or .mp4 file (replaced).", show_default="as it was to be"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Where the model is now.", show_default="where it was")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="auto, cpu, cuda, xpu, mps; cuda:N.", show_default="as before"),
    ] = None,
    how: Annotated[
        Decode | None,
        typer.Option("--decode", metavar="NAME", help="whole, exact, blended, auto.", show_default="as before"),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Another budget of GPU memory.", show_default="as before")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Another budget of host memory.", show_default="as before")
    ] = None,
    allow: Annotated[
        list[Allow] | None,
        typer.Option(metavar="NAME", help="With a budget: packed, fp8, int8, int4, blended_tiling; repeatable."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Decode latents that `lowtide generate` kept: it was stopped while decoding, or that failed.

    For example: lowtide decode /tmp/lowtide-latents-x1y2z3_4.safetensors

    The file holds the settings, so the picture or video is what it would have been; it stays for a week.
    """
    with reported(debug=debug):
        request = saved_request(latents)
        request = replace(
            request,
            out=request.out if out is None else out,
            model=request.model if model is None else resolve_model(model, files=True),
            device=request.device if device is None else device,
        )
        request = under(request, how, vram, ram, allow or ())
    with reported(debug=debug, has_budget=request.budget is not None):
        run(request)


def saved_request(latents: Path) -> Request:
    """What was asked for when latents were made; raises `InputError` for files of other origin."""
    from lowtide.pipelines.latents import run_of_latents

    try:
        return replace(request_from(run_of_latents(latents) or {}), latents=latents)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{latents} was not kept by `lowtide generate` of this version, so it does not say what to make. In Python "
            "pipe.decode_saved(path) decodes the latents of a pipeline."
        ) from error


def under(request: Request, how: Decode | None, vram: str | None, ram: str | None, allow: Sequence[Allow]) -> Request:
    """The request with another budget or another way to decode; without either, weights are read as they are needed."""
    if vram is None and ram is None and allow and request.budget is not None:
        budget: Budget | None = replace(request.budget, allow=tuple(dict.fromkeys(change.value for change in allow)))
    else:
        budget = budget_from(vram, ram, allow, [] if how is None else [f"--decode {how.value}"])
    if budget is not None:
        return replace(request, budget=budget, offload=Offload.NONE, casting=Casting.NONE, decode=Decode.AUTO)
    if how is not None:
        request = replace(request, budget=None, decode=how)
    if request.budget is not None or request.offload is not Offload.NONE:
        return request
    return replace(request, offload=Offload.MODEL)
