"""`lowtide plan`: what a model would take within budgets, without reading any of its weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.budget_options import Allow, Budget
from lowtide.cli.device_and_dtype import DTYPE_HELP, dtypes_to_try, tell_chosen
from lowtide.cli.errors import BAD_INPUT, InputError, reported, tell
from lowtide.cli.file_options import Beside, Config, Prediction, Vae, Words, configurations, guest_class
from lowtide.cli.guest_options import (
    Images,
    Settings,
    check_none_for_ours,
    images_and_settings,
)
from lowtide.cli.guest_plan import GuestAsked, first_with_plan, guest_options, look_at_guest
from lowtide.cli.request import VIDEO_SIZE_STEP, DType, check_guidance, check_steps, parse_size, resolve_model, sides
from lowtide.cli.video import VIDEO_PIPELINE, made_by
from lowtide.machine.device_names import KINDS
from lowtide.planning.alternatives import Outlook, look, what_to_try


@dataclass(frozen=True)
class Asked:
    """The run to plan: a model, a device ("cpu" or "cuda", which need not be here) and how much to make.

    `size` is (width, height) in pixels; None, as for `frames`, is the model's own.
    """

    model: str
    beside: Beside
    is_video: bool
    device: str
    dtype: str
    variant: str | None
    size: tuple[int, int] | None
    batch: int
    steps: int
    frames: int | None
    guidance: float

    def run_size(self) -> dict[str, Any]:
        """What is asked for, by the names of `lowtide.planning.run_size.RunSize`."""
        counts = {"pictures": self.batch, "prompts": self.batch, "steps": self.steps}
        return {**sides(self.size, self.frames), **counts, "guided": self.guidance > 1}


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Model folder or Hub id, whose configs are enough, or a .safetensors file of a whole pipeline.",
            show_default="the shipped model",
        ),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Budget of GPU memory: 6GB, 80%, auto, -1GB.", show_default=False)
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Budget of host memory, the process included.", show_default=False),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Budget of temporary files.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels, as 512 or 768x512.", show_default="the model's own")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Pictures or videos made at once.")] = 1,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps.", show_default="25; 50 for videos")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Frames of a video.", show_default="the model's own")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="X", help="1 turns guidance off: half the work.", show_default="7.5; 6 for videos"),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, xpu, mps: need not be here.")] = "auto",
    dtype: Annotated[DType, typer.Option(metavar="NAME", help=DTYPE_HELP)] = DType.AUTO,
    allow: Annotated[
        list[Allow] | None,
        typer.Option(
            metavar="NAME", help="packed, fp8, int8, int4, blended_tiling: may change the result. Repeatable."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Weight files to take, such as fp16.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
    config: Config = None,
    vae: Vae = None,
    tokenizer: Words = None,
    prediction: Prediction = None,
    images: Images = None,
    settings: Settings = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of the plan.", show_default=False)
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Plan a run within budgets: what it takes, how long, and what more memory would buy.

    For example: lowtide plan --ram 1GB --size 512

    No weights are read and nothing is computed; the GPU that --vram is a budget of need not be here.
    """
    with reported(debug=debug):
        budget = Budget(vram, ram, disk, tuple(dict.fromkeys(change.value for change in allow or ())))
        folder = resolve_model(model, files=True)
        check_plot(plot)
        beside = Beside(vae, tokenizer, config, prediction)
        guest = guest_class(folder, beside)
        if guest is not None:
            options = guest_options(batch, steps, size, frames, guidance)
            image, values, _ = images_and_settings(images, settings)
            own_dtype = None if dtype is DType.AUTO else dtype.value
            own_asked = GuestAsked(
                folder, guest, _device(device, budget), own_dtype, variant, {**options, **image}, values, config
            )
            show(look_at_guest(own_asked, budget), folder, as_json=as_json, plot=plot)
            return
        check_none_for_ours(folder, images, settings)
        configs = configurations(folder, beside)
        video = made_by(configs) == VIDEO_PIPELINE
        where = _device(device, budget)
        kind, dtypes = dtypes_to_try(dtype, configs, where)
        asked = Asked(
            model=folder,
            beside=beside,
            is_video=video,
            device=where,
            dtype=dtypes[0],
            variant=variant,
            size=None if size is None else parse_size(size, VIDEO_SIZE_STEP) if video else parse_size(size),
            batch=batch,
            steps=(50 if video else 25) if steps is None else steps,
            frames=frames,
            guidance=(6.0 if video else 7.5) if guidance is None else guidance,
        )
        _check(asked)
        outlooks = ((name, look_at(replace(asked, dtype=name), budget)) for name in dtypes)
        chosen, outlook = first_with_plan(outlooks)
        tell_chosen(kind, chosen, dtypes, where)
        show(outlook, folder, as_json=as_json, plot=plot)


def show(outlook: Outlook, model: str, *, as_json: bool, plot: Path | None) -> None:
    """Print what was planned for a model, and end with an exit code where nothing fits."""
    if as_json:
        typer.echo(json.dumps(outlook.to_dict(), indent=2))
    if outlook.plan is None:
        not_drawn = "" if plot is None else f"\nThere is nothing to draw, so {plot} was not written."
        tell(f"Error: {outlook.refusal}\n{what_to_try(outlook)}{not_drawn}")
        raise typer.Exit(BAD_INPUT)
    if not as_json:
        _print(outlook, model)
    if plot is not None:
        from lowtide.bench.plan_plot import plot_plan

        tell(f"Written: {plot_plan(outlook.plan, outlook.curve, plot)}")


def look_at(asked: Asked, budget: Budget) -> Outlook:
    """Plan the run from the model's configs alone."""
    import torch

    from lowtide.fitting.budgets import parse_budgets
    from lowtide.pipelines.load import prepare_checkpoint

    device = torch.device(asked.device)
    fit = prepare_checkpoint(
        asked.model,
        parse_budgets(device, budget.vram, budget.ram, budget.disk),
        device=device,
        dtype=getattr(torch, asked.dtype),
        variant=asked.variant,
        allow=budget.allow,
        given=asked.beside.components(),
        file_options=asked.beside.file_options(),
        **asked.run_size(),
    )
    return look(fit.workload, fit.rates, fit.budgets, fit.allow)


def check_plot(path: Path | None, option: str = "--plot") -> None:
    """Raise `InputError` before any work where a picture could not be written."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise InputError(f"{option} {path}: pictures are written as PNG. Give a name that ends in .png.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{option} needs matplotlib. Run pip install 'lowtide[bench]', or leave it out.")


def _device(name: str, budget: Budget) -> str:
    """The kind of device to plan for: a GPU if there is one, or if a budget of its memory is given."""
    if name not in ("auto", "cpu", *KINDS):
        raise InputError(f"--device {name}: possible are auto, cpu, {', '.join(KINDS)}.")
    if name == "cpu" and budget.vram is not None:
        raise InputError(f"--vram {budget.vram} with --device cpu: there all memory is --ram. Leave one of them out.")
    if name != "auto":
        return name
    from lowtide.machine.accelerators import best_device

    here = best_device().type
    return "cuda" if budget.vram is not None and here == "cpu" else here


def _check(asked: Asked) -> None:
    check_steps(asked.steps)
    check_guidance(asked.guidance)
    if asked.batch < 1:
        raise InputError(f"--batch {asked.batch}: at least one picture or video must be made.")
    if asked.frames is not None and not asked.is_video:
        raise InputError(f"--frames {asked.frames}: {asked.model} makes pictures. Leave it out.")
    if asked.frames is not None and asked.frames < 1:
        raise InputError(f"--frames {asked.frames}: at least one frame is needed. CogVideoX makes 49.")


def _print(outlook: Outlook, model: str) -> None:
    from rich.console import Console

    from lowtide.cli.plan_text import print_outlook

    print_outlook(Console(highlight=False), outlook, Path(model).name if Path(model).is_dir() else model)
