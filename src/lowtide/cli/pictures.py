"""Where pictures and videos go: names, and checks before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lowtide.cli.errors import InputError
from lowtide.media.png import fresh_path, numbered_paths, try_folder
from lowtide.media.unfinished import check_replaceable

_LONGEST_SLUG = 48
_WRITTEN_AS = {
    ".png": "pictures are written as PNG",
    ".mp4": "videos are written as MP4",
    ".wav": "sound is written as WAV",
}


def output_paths(out: Path | None, prompt: str, seeds: Sequence[int], suffix: str = ".png") -> list[Path]:
    """The file of each picture, or of each video or sound with the `suffix` ".mp4" or ".wav".

    `out` may be such a file (replaced if it is there; numbered when there are several), a folder, or `None` for the
    current folder. In a folder the names are made from the prompt and the seed, and never taken. Raises `InputError`
    for the name of another kind of file.
    """
    if out is not None and out.suffix.lower() == suffix and not out.is_dir():
        return numbered_paths(out, len(seeds))
    if out is not None and out.suffix and not out.is_dir():
        what = _WRITTEN_AS[suffix]
        raise InputError(f"--out {out}: {what}. Give a name that ends in {suffix}, or a folder.")
    folder = out or Path()
    return [fresh_path(folder / f"{slug(prompt)}-{seed}{suffix}") for seed in seeds]


def prepare_folders(paths: list[Path]) -> None:
    """Make the folders that are missing and try to write in them. Raises `InputError` where that is not possible, and
    where a name is that of something that no file may replace.
    """
    for path in paths:
        try:
            check_replaceable(path)
        except OSError as error:
            raise InputError(f"--out {path}: {error.strerror}.") from error
    for folder in {path.parent for path in paths}:
        try:
            try_folder(folder)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"Cannot write in {folder}: {reason}. Give another place with --out.") from error


def slug(prompt: str) -> str:
    """A file name made of the words of `prompt`: lower case, letters and digits of any script, joined by hyphens."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    name = ""
    for word in words:
        if len(f"{name}-{word}".encode()) > _LONGEST_SLUG:
            break
        name = f"{name}-{word}" if name else word
    return name or "picture"
