"""`lowtide generate`: pictures of one model, each written as it is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

import lowtide
from lowtide.cli.errors import tell
from lowtide.cli.request import Request, call_arguments, model_name, saved_form
from lowtide.cli.video import set_decoding
from lowtide.media.png import PictureFile

if TYPE_CHECKING:
    from lowtide.pipelines.pipeline_outputs import StableDiffusionPipelineOutput
    from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

WHOLE_UP_TO = 512 * 512
"""Pixels of a picture that is decoded whole where nothing else is asked for."""


def make_pictures(pipe: Any, request: Request, paths: Sequence[Path]) -> None:
    """Make the pictures with a pipeline of Stable Diffusion."""
    width, height = request.size or pipe.image_size(None, None)[::-1]
    if request.budget is None:
        set_decoding(pipe, request.decode, exact=width * height > WHOLE_UP_TO)
    draw(pipe, request, paths, {**_settings(request, pipe), "size": f"{width}x{height}"})


def draw(pipe: StableDiffusionPipeline, request: Request, paths: Sequence[Path], settings: Mapping[str, str]) -> None:
    """Draw one picture for each seed, and say its path as soon as it is there.

    A picture may be larger than memory: its rows go to the file as they are decoded.
    """
    from lowtide.pipelines.latents import telling_latents

    for seed, path in zip(request.seeds, paths, strict=True):
        file = PictureFile(path, {**settings, "seed": str(seed)})
        with telling_latents(saved_form(request, seed, path)):
            result = (
                pipe.decode_saved(request.latents, "file", file)
                if request.latents is not None
                else pipe(**call_arguments(request, seed), output_type="file", output_path=file)
            )
        output = cast("StableDiffusionPipelineOutput", result)
        if output.nsfw_content_detected and output.nsfw_content_detected[0]:
            tell(f"The model's safety checker blacked out the picture of seed {seed}. Another --seed may pass.")
        typer.echo(path)


def _settings(request: Request, pipe: StableDiffusionPipeline) -> dict[str, str]:
    """The PNG metadata that all pictures of one call share."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "steps": str(request.steps),
        "guidance_scale": str(request.guidance),
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": request.dtype.value,
        "casting": request.casting.value,
        "model": model_name(request.model),
        "Software": f"lowtide {lowtide.__version__}",
    }
