"""`lowtide generate`: a text prompt becomes pictures or videos."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lowtide
from lowtide.cli.budget_options import Allow, Budget, budget_from
from lowtide.cli.device_and_dtype import DTYPE_HELP, dtypes_to_try, resolve_device, tell_chosen
from lowtide.cli.draw_pictures import make_pictures
from lowtide.cli.errors import reported, tell
from lowtide.cli.file_options import Beside, Config, Prediction, Vae, Words, configurations, guest_class
from lowtide.cli.fitted import FittedRun, budget_options, write_timeline
from lowtide.cli.guest_options import (
    Images,
    Loras,
    Settings,
    check_none_for_ours,
    check_own_options,
    images_and_settings,
    loras_from,
)
from lowtide.cli.guest_request import GuestRequest
from lowtide.cli.guest_run import generate_guest
from lowtide.cli.pictures import output_paths, prepare_folders
from lowtide.cli.plan_command import check_plot
from lowtide.cli.request import (
    SCHEDULERS,
    VIDEO_SIZE_STEP,
    Casting,
    Decode,
    DType,
    Offload,
    Request,
    SchedulerName,
    model_name,
    parse_size,
    resolve_model,
    seeds_from,
    seeds_in_words,
    video_from,
)
from lowtide.cli.video import check_kind, make_videos
from lowtide.stages import Stages

if TYPE_CHECKING:
    import torch

    from lowtide.pipelines.base import DiffusionPipeline


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Folder, Hub id or .safetensors file.", show_default="the shipped model"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps.", show_default="25; 50 for videos")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|WxH", help="Pixels, as 512 or 768x512.", show_default="the model's own")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Picture i is drawn from N + i.", show_default="random, printed")
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What not to draw.", show_default=False)] = "",
    guidance: Annotated[
        float | None,
        typer.Option(metavar="X", help="How closely to follow the prompt; 1 is off.", show_default="7.5; 6 for videos"),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="How many pictures or videos.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A .png or .mp4 file (replaced) or a folder.", show_default="a new file here"
        ),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Make videos, with a model such as CogVideoX.")] = False,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Frames of a video.", show_default="the model's own")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(metavar="X", help="Frames a second of a video.", show_default="8; 16 with diffusers")
    ] = None,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Beside each video, a picture with some of its frames.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, xpu, mps; cuda:N.")] = "auto",
    dtype: Annotated[DType, typer.Option(metavar="NAME", help=DTYPE_HELP)] = DType.AUTO,
    scheduler: Annotated[
        SchedulerName | None,
        typer.Option(
            metavar="NAME", help="ddim, pndm, unipc, euler, dpm; cogvideox-ddim, -dpm.", show_default="the model's own"
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Weight files to take, such as fp16.", show_default=False)
    ] = None,
    offload: Annotated[
        Offload,
        typer.Option(metavar="NAME", help="Keep weights on disk or the host until needed: model, block, leaf; none."),
    ] = Offload.NONE,
    casting: Annotated[
        Casting,
        typer.Option(
            metavar="NAME",
            help="Keep weights in 8 bits (fp8, int8; int8_dynamic multiplies in them on a CPU) or in 4 (int4); none.",
        ),
    ] = Casting.NONE,
    decode: Annotated[
        Decode,
        typer.Option(metavar="NAME", help="whole, exact (by rows, the same picture), blended (tiles); auto chooses."),
    ] = Decode.AUTO,
    vram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep within so much GPU memory: 6GB, 80%, auto, -1GB.", show_default=False),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep within so much host memory, the process included.", show_default=False),
    ] = None,
    allow: Annotated[
        list[Allow] | None,
        typer.Option(
            metavar="NAME",
            help="With a budget: packed, fp8, int8, int4, blended_tiling may change the result; repeatable.",
        ),
    ] = None,
    config: Config = None,
    vae: Vae = None,
    tokenizer: Words = None,
    prediction: Prediction = None,
    images: Images = None,
    loras: Loras = None,
    settings: Settings = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of memory over time.", show_default=False)
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Make pictures from a text prompt, or videos with --video.

    For example: lowtide generate "a red sailboat on a calm sea at sunset"

    They are made one at a time, each from its own seed, so that any of them can be made again alone.

    Models that Lowtide has no pipeline of its own for, such as SDXL, Flux or Wan, are run by those of diffusers, always
    within a budget. They decide what is left out, and whether videos are made. Several are made at once.
    """
    with reported(debug=debug):
        beside = Beside(vae, tokenizer, config, prediction)
        folder = resolve_model(model, video=video, files=True)
        guest = guest_class(folder, beside)
    if guest is not None:
        with reported(debug=debug, has_budget=True):
            check_own_options(own_choice(offload, casting, decode), scheduler)
            own_image, own_settings, files = images_and_settings(images, settings)
            guest_request = GuestRequest(
                model=folder,
                config=config,
                class_name=guest,
                prompt=prompt,
                seeds=seeds_from(seed, count),
                is_seeded=seed is not None,
                negative=negative or None,
                steps=steps,
                size=None if size is None else parse_size(size, 1),
                frames=frames,
                guidance=guidance,
                images=own_image,
                image_files=files,
                settings=own_settings,
                loras=loras_from(loras),
                out=out,
                video=video,
                fps=fps,
                sheet=sheet,
                device=device,
                dtype=dtype,
                variant=variant,
                budget=Budget(vram, ram, allow=tuple(dict.fromkeys(change.value for change in allow or ()))),
                timeline=timeline,
            )
            generate_guest(guest_request)
        return
    with reported(debug=debug, has_budget=vram is not None or ram is not None):
        check_none_for_ours(folder, images, settings, loras)
        request = Request(
            prompt=prompt,
            negative=negative,
            steps=(50 if video else 25) if steps is None else steps,
            size=None if size is None else parse_size(size, VIDEO_SIZE_STEP) if video else parse_size(size),
            seeds=seeds_from(seed, count),
            guidance=(6.0 if video else 7.5) if guidance is None else guidance,
            out=out,
            device=device,
            dtype=dtype,
            scheduler=scheduler,
            variant=variant,
            offload=offload,
            decode=decode,
            casting=casting,
            model=folder,
            beside=beside,
            video=video_from(video, frames, fps, sheet),
            budget=budget_from(vram, ram, allow or (), own_choice(offload, casting, decode)),
            timeline=timeline,
        )
        check_plot(timeline, "--timeline")
        run(request)


def run(request: Request) -> None:
    """Load the model and make the pictures or videos, each written as it is decoded; then say what it took."""
    paths = output_paths(request.out, request.prompt, request.seeds, ".png" if request.video is None else ".mp4")
    check_kind(request.model, video=request.video is not None, beside=request.beside)
    from rich.console import Console

    from lowtide.memory import Meter, steady_malloc
    from lowtide.pipelines.not_finite import NotFiniteWarning
    from lowtide.planning.computing_dtype import first_that_fits
    from lowtide.progress import ProgressBar

    prepare_folders(paths)
    tell(_headline(request))
    steady_malloc(mmap_threshold=8 * 2**20, trim_threshold=64 * 2**20)
    device = resolve_device(request.device)
    kind, dtypes = dtypes_to_try(request.dtype, configurations(request.model, request.beside), device.type)
    meter = Meter(timeline=request.timeline is not None)
    before = Stages((ProgressBar(), meter))
    with before.stage("load"):
        dtype, pipe = first_that_fits(dtypes, lambda dtype: load_pipeline(request, device, dtype))
    tell_chosen(kind, dtype, dtypes, device.type)
    request = replace(request, dtype=DType(dtype))  # latents that are kept are decoded in it
    pipe.set_progress_bar_config(disable=True)
    fitted = None if request.budget is None else FittedRun(pipe)
    shown = (ProgressBar(),) if fitted is None else fitted.observers()
    with pipe.stages.observed(*shown, meter), warnings.catch_warnings():
        warnings.simplefilter("error", NotFiniteWarning)  # a black picture is no success
        if request.video is None:
            make_pictures(pipe, request, paths)
        else:
            make_videos(pipe, request, paths)
    if fitted is None:
        Console(stderr=True).print(meter.table())
    else:
        fitted.print_report(meter)
    if request.timeline is not None:
        write_timeline(meter, None if fitted is None else fitted.plan, request.timeline)


def load_pipeline(request: Request, device: torch.device, dtype: str) -> DiffusionPipeline:
    """The pipeline that `request` asks for, on `device`, computing in `dtype`, with the scheduler asked for."""
    offload = None if request.offload is Offload.NONE else request.offload.value
    budget: dict[str, Any] = {} if request.budget is None else budget_options(request)
    is_video = request.video is not None
    pipeline = lowtide.CogVideoXPipeline if is_video else lowtide.StableDiffusionPipeline
    pipe = pipeline.from_pretrained(
        request.model,
        torch_dtype=dtype,
        variant=request.variant,
        offload=offload,
        offload_device=device,
        casting=None if request.casting is Casting.NONE else request.casting.value,
        **request.beside.arguments(),
        **budget,
    )
    if request.scheduler is not None:
        pipe.scheduler = getattr(lowtide, SCHEDULERS[request.scheduler]).from_config(pipe.scheduler.config)
    return pipe.to(device) if offload is None and request.budget is None else pipe


def _headline(request: Request) -> str:
    doing = f"{request.steps} steps" if request.latents is None else "decoding kept latents"
    return f"lowtide {lowtide.__version__}: {model_name(request.model)}, {doing}, {seeds_in_words(request.seeds)}"


def own_choice(offload: Offload, casting: Casting, decode: Decode) -> list[str]:
    """The options that choose by hand what a budget would choose."""
    usual = {"--offload": (offload, Offload.NONE), "--casting": (casting, Casting.NONE)}
    usual["--decode"] = (decode, Decode.AUTO)
    return [f"{name} {value.value}" for name, (value, default) in usual.items() if value is not default]
