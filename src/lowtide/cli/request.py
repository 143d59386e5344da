"""What `lowtide generate` is asked for, checked before anything heavy is imported."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from lowtide.cli.budget_options import Budget
from lowtide.cli.errors import InputError
from lowtide.cli.file_options import NOTHING, Beside
from lowtide.hub import local_path
from lowtide.machine.device_names import DEVICE_NAMES, is_device_name
from lowtide.pipelines import number_checks

SHIPPED_MODEL = "seascapes"
VIDEO_SIZE_STEP = 16  # eight pixels a latent, two latents a patch
_LARGEST_SIDE = 16384
_WEIGHTS, _PICKLED = (".safetensors", ".gguf"), (".ckpt", ".pt", ".pth")
_LARGEST_SEED = 2**64 - 1
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


class DType(StrEnum):
    """The number formats that `--dtype` knows."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class SchedulerName(StrEnum):
    """The schedulers that `--scheduler` knows."""

    DDIM = "ddim"
    PNDM = "pndm"
    UNIPC = "unipc"
    EULER = "euler"
    DPM = "dpm"
    COGVIDEOX_DDIM = "cogvideox-ddim"
    COGVIDEOX_DPM = "cogvideox-dpm"


SCHEDULERS = {
    SchedulerName.DDIM: "DDIMScheduler",
    SchedulerName.PNDM: "PNDMScheduler",
    SchedulerName.UNIPC: "UniPCMultistepScheduler",
    SchedulerName.EULER: "EulerDiscreteScheduler",
    SchedulerName.DPM: "DPMSolverMultistepScheduler",
    SchedulerName.COGVIDEOX_DDIM: "CogVideoXDDIMScheduler",
    SchedulerName.COGVIDEOX_DPM: "CogVideoXDPMScheduler",
}
"""The classes of the schedulers."""


class Decode(StrEnum):
    """The ways to decode that `--decode` knows."""

    AUTO = "auto"
    WHOLE = "whole"
    EXACT = "exact"
    BLENDED = "blended"


class Offload(StrEnum):
    """The plans that `--offload` knows, from the most memory to the least."""

    NONE = "none"
    MODEL = "model"
    BLOCK = "block"
    LEAF = "leaf"
    SEQUENTIAL = "sequential"


class Casting(StrEnum):
    """The forms in 8 and 4 bits that `--casting` knows."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT8_DYNAMIC = "int8_dynamic"
    INT4 = "int4"


@dataclass(frozen=True)
class Video:
    """What `--video` asks for: frames (`None`: the model's own), frames a second, and whether to add a sheet."""

    frames: int | None
    fps: float
    sheet: bool


@dataclass(frozen=True)
class Request:
    """One call of `lowtide generate`; `size` is (width, height) in pixels, `None` for what the model was made for."""

    prompt: str
    negative: str
    model: str
    steps: int
    size: tuple[int, int] | None
    seeds: tuple[int, ...]
    guidance: float
    out: Path | None
    device: str
    dtype: DType
    scheduler: SchedulerName | None
    variant: str | None
    offload: Offload = Offload.NONE
    decode: Decode = Decode.AUTO
    casting: Casting = Casting.NONE
    video: Video | None = None
    budget: Budget | None = None
    timeline: Path | None = None
    beside: Beside = NOTHING
    latents: Path | None = None
    """Decode those of this file, instead of making them."""

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        _check_text(self.negative)
        check_steps(self.steps)
        check_guidance(self.guidance)
        check_device(self.device)


def call_arguments(request: Request, seed: int) -> dict[str, Any]:
    """What a call of a pipeline for one seed is given, of pictures and of videos alike.

    The noise is drawn on the CPU, so it is the same on every device.
    """
    import torch

    width, height = request.size or (None, None)
    return {
        "prompt": [request.prompt],
        "negative_prompt": [request.negative],
        "width": width,
        "height": height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": [torch.Generator("cpu").manual_seed(seed)],
    }


def saved_form(request: Request, seed: int, out: Path) -> dict[str, Any]:
    """One picture or video of a request, as JSON can hold it, to be made from anywhere; `request_from` reads it."""
    model = str(Path(request.model).absolute()) if Path(request.model).exists() else request.model
    beside = request.beside.placed()
    alone = replace(request, seeds=(seed,), model=model, beside=beside, out=None, timeline=None, latents=None)
    return {**asdict(alone), "out": str(out.absolute())}


def request_from(saved: Mapping[str, Any]) -> Request:
    """The request that `saved_form` gave; raises `KeyError` or `TypeError` for anything else."""
    size, budget, video, scheduler = (saved[name] for name in ("size", "budget", "video", "scheduler"))
    changed = {
        "size": size and tuple(size),
        "seeds": tuple(saved["seeds"]),
        "out": Path(saved["out"]),
        "dtype": DType(saved["dtype"]),
        "scheduler": scheduler and SchedulerName(scheduler),
        "offload": Offload(saved["offload"]),
        "decode": Decode(saved["decode"]),
        "casting": Casting(saved["casting"]),
        "video": video and Video(**video),
        "beside": Beside(**saved.get("beside", {})),
        "budget": budget and Budget(**{**budget, "allow": tuple(budget["allow"])}),
    }
    return Request(**{**saved, **changed})


def check_prompt(prompt: str) -> None:
    """Raise `InputError` for a prompt that is empty or no text."""
    if not prompt.strip():
        raise InputError('The prompt is empty. Say what to draw, for example "a red sailboat at sunset".')
    _check_text(prompt)


def check_steps(steps: int) -> None:
    """Raise `ValueError` for less than one step."""
    number_checks.check_steps(steps, "--steps")


def check_guidance(guidance: float) -> None:
    """Raise `ValueError` for infinity and NaN, `InputError` for a number below 0, which pipelines take as 0."""
    number_checks.check_guidance(guidance, "--guidance")
    if guidance < 0:
        raise InputError(f"--guidance {guidance}: give a number from 0 up. 7.5 is usual, 1 turns it off.")


def check_device(name: str) -> None:
    """Raise `InputError` for a name that is no device; whether it is here, `device_and_dtype.resolve_device` tells."""
    if name != "auto" and not is_device_name(name):
        raise InputError(f"--device {name}: possible are auto, {DEVICE_NAMES} (the N-th of its kind, from 0).")


def parse_size(text: str, step: int = 8) -> tuple[int, int]:
    """(width, height) in pixels, multiples of `step`, from "512" or "768x512".

    Raises `InputError` that names the nearest possible sizes.
    """
    match = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", text.strip(), re.ASCII)
    if match is None:
        raise InputError(f"--size {text}: write one number for a square, or WIDTHxHEIGHT, for example 512 or 768x512.")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(step <= side <= _LARGEST_SIDE for side in (width, height)):
        raise InputError(f"--size {text}: each side must be from {step} to {_LARGEST_SIDE} pixels.")
    if width % step or height % step:
        nearest = f"{_nearest(width, step)}x{_nearest(height, step)}"
        raise InputError(f"--size {text}: both sides must be multiples of {step}. The nearest is {nearest}.")
    return width, height


def sides(size: tuple[int, int] | None, frames: int | None) -> dict[str, int]:
    """What was asked for of (width, height) and frames, by the names of `lowtide.planning.run_size.RunSize`."""
    width, height = size or (None, None)
    asked = {"height": height, "width": width, "frames": frames}
    return {name: value for name, value in asked.items() if value is not None}


def seeds_from(seed: int | None, count: int) -> tuple[int, ...]:
    """One seed a picture: `seed`, `seed` + 1 and so on; a random start where none is given."""
    if count < 1:
        raise InputError(f"--count {count}: at least one picture or video must be asked for.")
    first = secrets.randbelow(2**32) if seed is None else seed
    if first < 0 or first + count - 1 > _LARGEST_SEED:
        raise InputError(f"--seed {first} with --count {count}: seeds must be from 0 to {_LARGEST_SEED} (2**64 - 1).")
    return tuple(range(first, first + count))


def video_from(video: bool, frames: int | None, fps: float | None, sheet: bool) -> Video | None:
    """What `--video` is asked for. Raises `InputError` for numbers that are not possible, and for any without it."""
    options = {"--frames": frames, "--fps": fps, "--sheet": sheet or None}
    given = [name for name, value in options.items() if value is not None]
    if given and not video:
        raise InputError(f"{given[0]} is for videos: add --video, and a --model that makes them.")
    if frames is not None and frames < 1:
        raise InputError(f"--frames {frames}: at least one frame is needed. CogVideoX makes 49, or another 8·n + 1.")
    if fps is not None and not 0.1 <= fps <= 240:
        raise InputError(f"--fps {fps:g}: give frames a second from 0.1 to 240. 8 is CogVideoX's own.")
    return Video(frames, 8.0 if fps is None else fps, sheet) if video else None


def resolve_model(model: str | None, *, video: bool = False, files: bool = False) -> str:
    """The folder or Hub id to load: the shipped model where none is given. It makes pictures.

    With `files`, .safetensors files of whole pipelines as well; what a file holds is looked at later.
    """
    if model is None and video:
        raise InputError("--video: no video model is shipped. Give --model, such as THUDM/CogVideoX-2b.")
    if model is None:
        return str(shipped_model())
    if not model.strip():
        raise InputError("--model is empty. Give a model folder or a Hub id, or leave it out for the shipped model.")
    folder = local_path(model)
    if folder.is_dir():
        return str(folder)
    if folder.is_file() and not (files and folder.suffix.lower() in (*_WEIGHTS, *_PICKLED)):
        also = ", or a .safetensors file of a whole pipeline" if files else ""
        raise InputError(
            f"--model {model}: this is a file. Give the folder that holds model_index.json, or a Hub id{also}."
        )
    if folder.is_file():
        return str(folder)
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"--model {model}: there is no such folder, and it is no Hub id (those look like owner/name).")
    return model


def model_name(model: str) -> str:
    """A Hub id as it is; of a path the last name alone, since pictures are passed on and paths are private."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model


def seeds_in_words(seeds: tuple[int, ...]) -> str:
    """Such as "seed 7", or "seeds 7 to 9"."""
    first, last = seeds[0], seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def shipped_model() -> Path:
    """The folder of the model that comes with Lowtide. Raises `InputError` if this installation lacks it."""
    folder = Path(str(resources.files("lowtide"))) / "assets" / SHIPPED_MODEL
    if not (folder / "model_index.json").is_file():
        raise InputError(f"The shipped model is missing at {folder}. Install Lowtide again, or give another --model.")
    return folder


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"The prompt is not valid text in this terminal's encoding: {error.reason}.") from error
