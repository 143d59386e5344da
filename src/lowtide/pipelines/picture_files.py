"""Decoded pictures on their way to files, rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lowtide.hub import local_path
from lowtide.media.png import PictureFile, PngWriter, fresh_path, numbered_paths, try_folder
from lowtide.media.unfinished import check_replaceable
from lowtide.pipelines.pipeline_outputs import to_unit_range

OutputPath = str | os.PathLike[str] | PictureFile
THUMBNAIL_SIDE = 512
"""The shorter side, at least, of the small copy that a safety checker sees of a picture in a file."""


def picture_files(output_path: OutputPath | Sequence[OutputPath] | None, count: int) -> list[PictureFile]:
    """One file for each of `count` pictures: as named, or numbered from one name, or new names in the current folder.

    Raises `ValueError` for names that do not fit, and `OSError` where no file can be made.
    """
    if isinstance(output_path, Sequence) and not isinstance(output_path, (str, bytes)):
        files = [_file(path) for path in output_path]
        if len(files) != count:
            raise ValueError(f"{len(files)} output paths for {count} pictures: give one for each, or one for all.")
    else:
        first = _file("picture.png" if output_path is None else output_path)
        paths = numbered_paths(first.path, count)
        files = [PictureFile(fresh_path(path) if output_path is None else path, first.text) for path in paths]
    if len({file.path for file in files}) < count:
        raise ValueError("Two pictures cannot have one output path.")
    for file in files:
        if file.path.is_dir():
            raise IsADirectoryError(f"{file.path} is a folder. Give the name of a file as output_path.")
        check_replaceable(file.path)
        _check_writable(file.path.parent)
    return files


def _check_writable(folder: Path) -> None:
    try:
        try_folder(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(error.errno, f"Nothing can be written in {folder}: {reason}. Give another output_path") from error


def _file(path: OutputPath) -> PictureFile:
    if not isinstance(path, (str, os.PathLike, PictureFile)):
        raise ValueError(f"output_path={path!r:.80} is not possible: give the name of a file, or a list of names.")
    return path if isinstance(path, PictureFile) else PictureFile(local_path(path))


def write_picture(
    file: PictureFile,
    width: int,
    height: int,
    produce: Callable[[Callable[[int, torch.Tensor], None]], None],
    is_unsafe: Callable[[torch.Tensor], bool] | None,
    look: Callable[[torch.Tensor], None] = lambda _: None,
) -> bool:
    """Write what `produce` decodes, maps `[1, 3, rows, W]` in [-1, 1]; whether it was found unsafe, and is black.

    `is_unsafe` is asked about a small copy `[1, 3, h, w]` in [0, 1]; `look` sees all rows as they are decoded.
    """
    small = None if is_unsafe is None else _Thumbnail(width, height)
    with PngWriter(file, width, height) as png:

        def write(first: int, rows: torch.Tensor) -> None:
            look(rows)
            pixels_HW3 = to_unit_range(rows)[0].permute(1, 2, 0).float().cpu().numpy()
            png.write((pixels_HW3 * 255).round().astype(np.uint8))
            if small is not None:
                small.add(first, pixels_HW3)

        produce(write)
        unsafe = small is not None and is_unsafe is not None and is_unsafe(small.picture())
        if unsafe:
            png.restart()
            for first in range(0, height, 64):
                png.write(np.zeros((min(64, height - first), width, 3), dtype=np.uint8))
    return unsafe


class _Thumbnail:
    """A small copy of a picture: means over squares."""

    def __init__(self, width: int, height: int) -> None:
        self._factor = max(1, min(width, height) // THUMBNAIL_SIDE)
        self._sums = np.zeros((-(-height // self._factor), -(-width // self._factor), 3), dtype=np.float32)
        self._counts = np.zeros_like(self._sums[..., :1])

    def add(self, first: int, pixels_HW3: np.ndarray) -> None:
        columns = np.arange(0, pixels_HW3.shape[1], self._factor)
        sums = np.add.reduceat(pixels_HW3, columns, axis=1)
        widths = np.diff([*columns, pixels_HW3.shape[1]])[:, None]
        for row, line in enumerate(sums, start=first):
            self._sums[row // self._factor] += line
            self._counts[row // self._factor] += widths

    def picture(self) -> torch.Tensor:
        return torch.from_numpy(self._sums / self._counts).permute(2, 0, 1)[None]
