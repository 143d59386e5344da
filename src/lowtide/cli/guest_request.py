"""What `lowtide generate` is asked for with a pipeline of diffusers, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Signature
from pathlib import Path
from typing import Any

from lowtide.cli.budget_options import Budget
from lowtide.cli.errors import InputError
from lowtide.cli.guest_options import Lora
from lowtide.cli.pictures import output_paths
from lowtide.cli.request import DType, check_device, check_guidance, check_prompt, check_steps
from lowtide.guests.asked import PROMPT, call_arguments, frame_rate, makes_clips, makes_sound, own_names, value_of
from lowtide.guests.written_call import call_of

USUAL_FPS = 16.0
"""Frames a second of clips whose pipeline does not say how many it makes them for."""


@dataclass(frozen=True)
class GuestRequest:
    """One call of a pipeline of diffusers; None for what is not asked for, which the pipeline decides itself.

    `class_name` is the pipeline's, `size` (width, height) in pixels, `images` and `settings` what `--image` and `--set`
    said, `image_files` the names of the files of pictures by argument, `config` where the configurations of a file are.
    There is a seed for each picture or clip. `is_seeded` says that seeds were asked for; else a pipeline that draws
    from none is no error.
    """

    model: str
    class_name: str
    prompt: str
    seeds: tuple[int, ...]
    is_seeded: bool = False
    negative: str | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    guidance: float | None = None
    images: Mapping[str, Any] = field(default_factory=dict[str, Any])
    image_files: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loras: tuple[Lora, ...] = ()
    out: Path | None = None
    video: bool = False
    fps: float | None = None
    sheet: bool = False
    device: str = "auto"
    dtype: DType = DType.AUTO
    variant: str | None = None
    config: str | None = None
    budget: Budget = field(default_factory=Budget)
    timeline: Path | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        if self.guidance is not None:
            check_guidance(self.guidance)
        if self.frames is not None and self.frames < 1:
            raise InputError(f"--frames {self.frames}: at least one frame is needed.")
        if self.fps is not None and not 0.1 <= self.fps <= 240:
            raise InputError(f"--fps {self.fps:g}: give frames a second from 0.1 to 240.")
        check_device(self.device)


@dataclass(frozen=True)
class NamedCall:
    """The call that a request asks for: its signature, its arguments by its own names, generators left out, and where
    results go.
    """

    signature: Signature
    arguments: Mapping[str, Any]
    paths: tuple[Path, ...]

    @property
    def is_of_clips(self) -> bool:
        """Whether it makes clips, as far as its arguments tell."""
        return makes_clips(self.signature)

    @property
    def steps(self) -> int | None:
        """The denoising steps, as asked or the call's own."""
        return self.argument("--steps")

    def argument(self, option: str) -> Any:
        """What an option's argument is, as asked or by default; None where the call has none."""
        names = own_names(option, self.signature)
        return next((self.arguments.get(name, value_of(self.signature, name)) for name in names), None)

    def fps(self, asked: float | None) -> float:
        """The frames a second of clips."""
        return asked or frame_rate(self.signature, self.arguments) or USUAL_FPS


def call_for(request: GuestRequest) -> NamedCall:
    """What a request asks for, checked against the signature of the pipeline's call.

    Raises `NoGuestsError`, `CheckpointError` and `InputError`.
    """
    signature = call_of(request.class_name)
    if own_names(PROMPT, signature):
        check_prompt(request.prompt)
    try:
        arguments = call_arguments(
            request.class_name, signature, _options(request, signature), request.settings, lacking=("--batch",)
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    suffix = _suffix(request, signature)
    paths = output_paths(request.out, request.prompt, request.seeds, suffix)
    arguments = {name: value for name, value in arguments.items() if name not in own_names("--seed", signature)}
    return NamedCall(signature, arguments, tuple(paths))


def _options(request: GuestRequest, signature: Signature) -> dict[str, Any]:
    """What was asked for, by option."""
    count = len(request.seeds)
    asked = {
        PROMPT: request.prompt or None,
        "--negative": request.negative,
        "--size": request.size,
        "--frames": request.frames,
        "--steps": request.steps,
        "--guidance": request.guidance,
        "--count": count if count > 1 else None,
        "--seed": request.seeds if request.is_seeded or own_names("--seed", signature) else None,
    }
    return {**{option: value for option, value in asked.items() if value is not None}, **request.images}


def _suffix(request: GuestRequest, call: Signature) -> str:
    if makes_clips(call):
        return ".mp4"
    what, suffix = ("sound", ".wav") if makes_sound(call) else ("pictures", ".png")
    if request.video:
        raise InputError(f"--model {request.model} makes {what}: leave out --video.")
    for option, is_given in (("--fps", request.fps is not None), ("--sheet", request.sheet)):
        if is_given:
            raise InputError(f"{option} is for videos, and a {request.class_name} makes {what}: leave it out.")
    return suffix


def seeds_by_result(seeds: Sequence[int], count: int) -> list[int]:
    """The seed of each of `count` results: of a call from one seed, that seed."""
    return list(seeds) if len(seeds) == count else [seeds[0]] * count
