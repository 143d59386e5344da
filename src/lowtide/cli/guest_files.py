"""What came out of a pipeline of diffusers, in files: pictures with their settings in them, videos, sheets, sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import lowtide
from lowtide.cli.errors import tell
from lowtide.cli.guest_request import GuestRequest, NamedCall, seeds_by_result
from lowtide.cli.request import model_name
from lowtide.cli.video import sheet_paths
from lowtide.media.png import fresh_path, numbered_paths
from lowtide.media.unfinished import whole_or_not
from lowtide.stages import Stages

if TYPE_CHECKING:
    from PIL import Image

    from lowtide.guests.results import Results


def write(results: Results, request: GuestRequest, call: NamedCall, pipe: Any, stages: Stages) -> None:
    """Write all pictures, clips and sounds, and say the path of each on stdout.

    Raises `ValueError` where there is nothing that a file can hold.
    """
    if not results.pictures and not results.clips and not results.sounds:
        raise ValueError(
            f"A call of {request.class_name} gives {', '.join(results.others) or 'nothing'}, neither pictures nor "
            "frames. Call it in Python: lowtide.load(...)."
        )
    settings = _settings(request, call, pipe)
    for picture, path, seed in _placed(results.pictures, request, call, ".png"):
        _write_picture(picture, path, {**settings, "seed": str(seed), "size": f"{picture.width}x{picture.height}"})
    for clip, path, _ in _placed(results.clips, request, call, ".mp4"):
        _write_clip(clip, path, request, call, stages)
    if results.sounds:
        _write_sounds(results, request, call, pipe)
    dropped = [name for name in results.others if "nsfw" not in name]
    if dropped:
        tell(f"Not written, since it is neither pictures nor frames: {', '.join(dropped)}.")


def _write_sounds(results: Results, request: GuestRequest, call: NamedCall, pipe: Any) -> None:
    from lowtide.guests.sounds import sampling_rate
    from lowtide.media.wave_file import write_wave

    rate = sampling_rate(pipe)
    if rate is None:
        tell(f"Not written: sound. A {request.class_name} does not say how many samples of it are a second.")
        return
    for sound, path, _ in _placed(results.sounds, request, call, ".wav"):
        write_wave(sound, path, rate)
        typer.echo(path)
    channels = len(results.sounds[0])
    tell(f"Sound: {rate} samples a second, {channels} channel{'' if channels == 1 else 's'}.")


def _placed(results: Sequence[Any], request: GuestRequest, call: NamedCall, suffix: str) -> list[tuple[Any, Path, int]]:
    """Each result with its path and the seed that it comes from."""
    paths = list(call.paths)
    if paths[0].suffix.lower() != suffix:  # sound beside videos, or another kind than its arguments made us expect
        paths = [path.with_suffix(suffix) for path in paths]
        is_named = request.out is not None and request.out.suffix.lower() == call.paths[0].suffix.lower()
        paths = paths if is_named and suffix == ".wav" else [fresh_path(path) for path in paths]
    if len(results) != len(paths):
        paths = numbered_paths(paths[0], len(results))
    return list(zip(results, paths, seeds_by_result(request.seeds, len(results)), strict=True))


def _write_picture(picture: Image.Image, path: Path, texts: dict[str, str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    with whole_or_not(path) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=info)
    typer.echo(path)


def _write_clip(frames: Sequence[Any], path: Path, request: GuestRequest, call: NamedCall, stages: Stages) -> None:
    from lowtide.media.video_file import contact_sheet
    from lowtide.utils import export_to_video

    fps = call.fps(request.fps)
    with stages.stage("write"):
        export_to_video(frames, path, fps=fps)
    typer.echo(path)
    if request.sheet:
        named = request.out is not None and request.out.suffix.lower() == ".mp4"
        (sheet,) = sheet_paths([path], named=named)
        with whole_or_not(sheet) as unfinished:
            contact_sheet(frames, fps=fps).save(unfinished, "PNG")
        typer.echo(sheet)


def _settings(request: GuestRequest, call: NamedCall, pipe: Any) -> dict[str, str]:
    """The PNG metadata that all pictures of one call share: what was asked for, and what decided the result."""
    from lowtide.guests.doors import plan_of

    plan = plan_of(pipe)
    assert plan is not None
    castings = sorted({part.casting for part in plan.components.values() if part.casting is not None})
    images = [(name, Path(file).name) for name, file in request.image_files]
    settings = {name: value for name, value in request.settings.items() if name not in dict(images)}
    said = {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "steps": call.steps,
        "guidance_scale": call.argument("--guidance"),
        "settings": json.dumps(settings) if settings else None,
        "images": ", ".join(f"{name}={file}" if name else file for name, file in images) or None,
        "loras": ", ".join(f"{lora.file.name}:{lora.strength:g}" for lora in request.loras) or None,
        "scheduler": type(pipe.scheduler).__name__ if getattr(pipe, "scheduler", None) is not None else None,
        "dtype": plan.dtype,
        "casting": ", ".join(castings) or "none",
        "pipeline": request.class_name,
        "model": model_name(request.model),
        "Software": f"lowtide {lowtide.__version__}",
    }
    return {name: str(value) for name, value in said.items() if value is not None}
