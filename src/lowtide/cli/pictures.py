"""Where pictures go and how they are written: names, checks before any work is done, atomic PNGs with metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_SLUG = 48


def picture_paths(out: Path | None, prompt: str, seeds: list[int]) -> list[Path]:
    """The file of each picture.

    `out` may be a `.png` file (replaced if it is there; numbered when there are several pictures), a folder, or
    `None` for the current folder. In a folder the names are made from the prompt and the seed, and never taken.
    Raises `InputError` for a file name that is not a PNG.
    """
    if out is not None and out.suffix.lower() == ".png" and not out.is_dir():
        return [out] if len(seeds) == 1 else [out.with_stem(f"{out.stem}-{n}") for n in range(1, len(seeds) + 1)]
    if out is not None and out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: pictures are written as PNG. Give a name that ends in .png, or a folder.")
    folder = out or Path()
    return [_fresh(folder / f"{slug(prompt)}-{seed}.png") for seed in seeds]


def prepare_folders(paths: list[Path]) -> None:
    """Make the folders that are missing and try to write in them. Raises `InputError` where that is not possible."""
    for folder in {path.parent for path in paths}:
        probe = folder / f".lowtide-{os.getpid()}.probe"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"Cannot write in {folder}: {reason}. Give another place with --out.") from error


def save_png(image: Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write `image` to `path` with `metadata` as PNG text; at any moment there is the old file or the whole new one."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value)
    unfinished = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        image.save(unfinished, format="PNG", pnginfo=text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def slug(prompt: str) -> str:
    """A file name made of the words of `prompt`: lower case, letters and digits of any script, joined by hyphens."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    name = ""
    for word in words:
        if len(f"{name}-{word}".encode()) > _LONGEST_SLUG:
            break
        name = f"{name}-{word}" if name else word
    return name or "picture"


def _fresh(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
