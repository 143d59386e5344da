"""`lowtide generate --video`: clips of frames become .mp4 files, and sheets with some of their frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from lowtide.cli.errors import InputError
from lowtide.cli.file_options import NOTHING, Beside, configurations
from lowtide.cli.request import Decode, Request, call_arguments, saved_form
from lowtide.hub import Source
from lowtide.media.png import fresh_path
from lowtide.media.unfinished import whole_or_not
from lowtide.stages import Stage

VIDEO_PIPELINE, PICTURE_PIPELINE = "CogVideoXPipeline", "StableDiffusionPipeline"
WHOLE_CLIPS_UP_TO = 144 * 144
"""Pixels of a frame up to which a clip's frames are decoded whole where nothing else is asked for."""
LONGEST_NAME = 200
"""Bytes of the name of a file, which is longer while it is written."""


def make_videos(pipe: Any, request: Request, paths: Sequence[Path]) -> None:
    """Make one video for each seed, and say its path as soon as it is there; the sheet lies beside it.

    The noise is drawn on the CPU, so it is the same on every device.
    """
    video = request.video
    assert video is not None
    sheets = (
        sheet_paths(paths, named=request.out is not None and request.out.suffix.lower() == ".mp4")
        if video.sheet
        else [None] * len(paths)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline says it again
        rows, columns, _ = pipe.clip_size(*(request.size or (None, None))[::-1], video.frames)
    if request.budget is None:
        set_decoding(pipe, request.decode, exact=rows * columns > WHOLE_CLIPS_UP_TO)
    for seed, path, sheet in zip(request.seeds, paths, sheets, strict=True):
        make_video(pipe, request, seed, path, sheet)


def make_video(pipe: Any, request: Request, seed: int, path: Path, sheet: Path | None) -> None:
    """Make one video, and its sheet where there is a path for it."""
    from lowtide.media.video_file import contact_sheet
    from lowtide.pipelines.latents import telling_latents
    from lowtide.utils import export_to_video

    assert request.video is not None
    with telling_latents(saved_form(request, seed, path)):
        made = (
            pipe.decode_saved(request.latents)
            if request.latents is not None
            else pipe(**call_arguments(request, seed), num_frames=request.video.frames)
        )
    frames = made.frames[0]
    fps = request.video.fps
    with pipe.stages.stage("write", steps=len(frames)) as stage:
        export_to_video(_counted(frames, stage), path, fps=fps)
    typer.echo(path)
    if sheet is not None:
        with whole_or_not(sheet) as unfinished:
            contact_sheet(frames, fps=fps).save(unfinished, "PNG")
        typer.echo(sheet)


def sheet_paths(paths: Sequence[Path], *, named: bool) -> list[Path]:
    """A sheet's file beside each video's: replaced where the video was `named`, else a new one.

    Raises `InputError` for a name that is too long.
    """
    sheets = [path.with_name(f"{path.stem}-sheet.png") for path in paths]
    for sheet in sheets:
        if len(sheet.name.encode()) > LONGEST_NAME:
            raise InputError(f"--out {sheet.stem[:40]}…: the name is too long to put -sheet.png behind it.")
    return sheets if named else [fresh_path(sheet) for sheet in sheets]


def set_decoding(pipe: Any, decode: Decode, *, exact: bool) -> None:
    """Decode as asked; "auto" is row by row if `exact`: where the whole would take more than about a gigabyte."""
    if decode is Decode.EXACT or (decode is Decode.AUTO and exact):
        pipe.enable_vae_tiling("exact")
    elif decode is Decode.BLENDED:
        pipe.enable_vae_tiling()


def made_by(configs: Source, class_name: str | None = None) -> str:
    """The class of pipeline that a model's index names, once its configurations were read and fit; free of torch.

    `class_name` is the class that it is to be loaded as, None for its own.
    """
    from lowtide.pipelines.parts import check_checkpoint

    return check_checkpoint(configs, class_name)


def check_kind(model: str, *, video: bool, beside: Beside = NOTHING) -> None:
    """Raise for a model that cannot be loaded or makes the other kind of thing, before any of its weights are fetched.

    Nothing heavy is imported for it, but for a file.
    """
    from lowtide.loading.model_index import MODEL_INDEX, read_model_index

    configs = configurations(model, beside)
    own = read_model_index(configs.fetch([MODEL_INDEX]))[0]
    if own == VIDEO_PIPELINE and not video:
        raise InputError(f"--model {model} makes videos: add --video.")
    if own == PICTURE_PIPELINE and video:
        raise InputError(f"--model {model} makes pictures: leave out --video, or give a model such as CogVideoX.")
    made_by(configs, VIDEO_PIPELINE if video else PICTURE_PIPELINE)


def _counted(frames: Iterable[Any], stage: Stage) -> Iterator[Any]:
    for frame in frames:
        yield frame
        stage.advance()
