"""Options for pipelines of diffusers: `--set`, `--image` and `--lora`, read and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.errors import InputError

_PANEL = "Models that pipelines of diffusers run"
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="[NAME=]FILE",
        help="A picture to begin with, or for another argument, as mask_image=FILE; repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other argument of the call, such as strength=0.6; repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:X]",
        help="A LoRA (.safetensors), at X times its strength; repeatable.",
        rich_help_panel=_PANEL,
    ),
]
_NAME = re.compile(r"([A-Za-z_]\w*)=(.*)", re.ASCII | re.DOTALL)
_FORMS = ("pil", "np", "pt")


@dataclass(frozen=True)
class Lora:
    """A file of LoRA weights, and how much of them counts."""

    file: Path
    strength: float = 1.0


def check_none_for_ours(
    model: str, images: Sequence[str] | None, settings: Sequence[str] | None, loras: Sequence[str] | None = None
) -> None:
    """Raise `InputError` for options that a model of ours does not take."""
    for option, given in (("--image", images), ("--set", settings), ("--lora", loras)):
        if given:
            raise InputError(
                f"{option} {given[0]}: {Path(model).name} is loaded by a pipeline of Lowtide's own, which takes none. "
                "In Python, lowtide.load(model, native=False) loads it by that of diffusers."
            )


def check_own_options(given: Sequence[str], scheduler: str | None = None) -> None:
    """Raise `InputError` for options that only models of ours take: those `given`, each with its value."""
    if given:
        raise InputError(
            f"{given[0]} is for models that Lowtide has a pipeline of its own for. With others a budget chooses where "
            "weights rest and how to decode: give --ram or --vram, such as --ram 8GB (without, it is what is free), "
            "and --allow packed, fp8, int8, int4 or blended_tiling to let it change the result."
        )
    if scheduler is not None:
        raise InputError(
            f"--scheduler {scheduler} is for models that Lowtide has a pipeline of its own for; others use the one "
            "that comes with them. In Python, set pipe.scheduler."
        )


def settings_from(given: Sequence[str] | None) -> dict[str, Any]:
    """Arguments by name: each value is read as JSON, and where it is none, it is the text itself.

    Raises `InputError` for anything else than NAME=VALUE, and for results in a form that cannot be written.
    """
    settings: dict[str, Any] = {}
    for text in given or ():
        match = _NAME.fullmatch(text)
        if match is None:
            raise InputError(f"--set {text}: write NAME=VALUE, such as --set strength=0.6.")
        settings[match[1]] = _value(match[2])
    form = settings.get("output_type", _FORMS[0])
    if form not in _FORMS:
        raise InputError(f"--set output_type={form}: only {', '.join(_FORMS)} can be written to files.")
    return settings


def images_from(files: Sequence[tuple[str, str]]) -> tuple[Any, dict[str, Any]]:
    """The picture without a name (None without any), and those by name, as RGB PIL images; of several a list.

    `files` are those of `image_files`. Raises `InputError` for files that are no pictures.
    """
    pictures: dict[str, list[Any]] = {}
    for name, file in files:
        pictures.setdefault(name, []).append(_picture(file))
    named = {name: several if len(several) > 1 else several[0] for name, several in pictures.items()}
    return named.pop("", None), named


def image_files(given: Sequence[str] | None) -> list[tuple[str, str]]:
    """What `--image` gave: for each picture the argument, empty where it has no name, and the file."""
    matches = [(text, None if Path(text).is_file() else _NAME.fullmatch(text)) for text in given or ()]
    return [("", text) if match is None else (match[1], match[2]) for text, match in matches]


def loras_from(given: Sequence[str] | None) -> tuple[Lora, ...]:
    """Files of LoRA weights. Raises `InputError` for those that are not there, or in another format."""
    return tuple(map(_lora, given or ()))


def images_and_settings(
    images: Sequence[str] | None, settings: Sequence[str] | None
) -> tuple[Mapping[str, Any], Mapping[str, Any], Sequence[tuple[str, str]]]:
    """What `--image` and `--set` ask for: options by name, arguments by the call's own names, and `image_files`."""
    files = image_files(images)
    image, named = images_from(files)
    values = settings_from(settings)
    twice = sorted(set(named) & set(values))
    if twice:
        raise InputError(f"{twice[0]} is given by --image and by --set: leave one of them out.")
    return ({} if image is None else {"--image": image}), {**named, **values}, files


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _picture(file: str) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(Path(file).expanduser()) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"--image {file}: this is no picture that can be read.") from error
    except OSError as error:
        raise InputError(f"--image {file}: {error.strerror or error}.") from error


def _lora(text: str) -> Lora:
    file, _, strength = text.rpartition(":")
    try:
        lora = Lora(Path(file), float(strength)) if file else Lora(Path(text))
    except ValueError:
        lora = Lora(Path(text))
    if lora.file.suffix.lower() != ".safetensors":
        raise InputError(f"--lora {text}: give a .safetensors file, and behind a colon how much of it counts: x:0.8.")
    if not lora.file.is_file():
        raise InputError(f"--lora {text}: there is no file {lora.file}.")
    return lora
