"""Pictures written to files a few rows at a time, so that they may be larger than memory.

PNG as of the W3C Recommendation "Portable Network Graphics", third edition: 8-bit RGB, not interlaced.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from lowtide.media.unfinished import naming, take_place, unfinished_path

if TYPE_CHECKING:
    import numpy as np

LARGEST_SIDE = 2**31 - 1
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = 2**18
_LEVEL = 6


@dataclass(frozen=True)
class PictureFile:
    """A PNG file to be written, and texts to put into it by keyword. Raises `ValueError` for another kind of file."""

    path: Path
    text: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for keyword, text in self.text.items():
            plain = keyword.isprintable() and keyword.strip() == keyword and _is_latin(keyword)
            if not plain or not 1 <= len(keyword) <= 79 or "\0" in text:
                raise ValueError(f"{keyword!r} is no keyword for a PNG (1 to 79 Latin letters), or its text has a NUL.")
        if "\0" in str(self.path):
            raise ValueError(f"{str(self.path)!r} cannot be the name of a file.")
        if self.path.suffix.lower() != ".png":
            raise ValueError(f"{self.path}: pictures are written as PNG. Give a name that ends in .png.")


def try_folder(folder: Path) -> None:
    """Make a folder if it is missing and try to write in it; raises `OSError` where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lowtide-"):
        pass


def fresh_path(path: Path) -> Path:
    """The path itself, or the first one with a number that is not taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def numbered_paths(path: Path, count: int) -> list[Path]:
    """One path, or so many with numbers from 1."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{n}") for n in range(1, count + 1)]


class PngWriter:
    """Write one PNG, band by band from top to bottom: `with PngWriter(file, width, height) as png: png.write(rows)`.

    At any moment there is the old file or the whole new one under the name: an exception inside the block, or a picture
    with rows missing (which is an `AssertionError`), leaves the old one. Raises `OSError` if it cannot be written.
    """

    def __init__(self, file: PictureFile, width: int, height: int) -> None:
        self.file, self.width, self.height = file, width, height
        self._target = Path(os.path.realpath(file.path))  # a link stays one
        self._unfinished = unfinished_path(self._target)
        self._out: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._out = self._unfinished.open("wb")
            with naming(self.file.path):
                self.restart()
        except BaseException:
            if self._out is not None:
                self._out.close()
            self._unfinished.unlink(missing_ok=True)
            raise
        return self

    def restart(self) -> None:
        """Forget all rows: the next one is the first."""
        assert self._out is not None
        self._rows = 0
        self._above: Any = None
        self._deflate = zlib.compressobj(_LEVEL)
        self._pending = bytearray()
        self._out.seek(0)
        self._out.truncate()
        self._out.write(_SIGNATURE)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0))
        for keyword, text in self.file.text.items():
            self._chunk(*_text_chunk(keyword, text))

    def write(self, rows_HW3: np.ndarray) -> None:
        """Add rows of uint8 RGB values."""
        filtered = _filtered(rows_HW3.reshape(len(rows_HW3), -1), self._above)
        self._above = rows_HW3[-1].reshape(-1).copy()
        self._rows += len(rows_HW3)
        with naming(self.file.path):
            self._data(self._deflate.compress(filtered.tobytes()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._out is not None
        try:
            if kind is None:
                assert self._rows == self.height, f"{self._rows} rows were written of {self.height}"
                with naming(self.file.path):
                    self._data(self._deflate.flush(), last=True)
                    self._chunk(b"IEND", b"")
                    self._out.close()
                take_place(self._unfinished, self._target)
        finally:
            try:
                self._out.close()
            finally:
                self._unfinished.unlink(missing_ok=True)

    def _data(self, content: bytes, *, last: bool = False) -> None:
        self._pending += content
        if len(self._pending) >= _CHUNK or (last and self._pending):
            self._chunk(b"IDAT", bytes(self._pending))
            self._pending.clear()

    def _chunk(self, kind: bytes, content: bytes) -> None:
        assert self._out is not None
        checksum = zlib.crc32(kind + content)
        self._out.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum))


def _is_latin(text: str) -> bool:
    return all(ord(letter) < 256 for letter in text)


def _text_chunk(keyword: str, text: str) -> tuple[bytes, bytes]:
    """A keyword and its text: in Latin-1 where that is possible, else in UTF-8 (sections 11.3.3.2 and 11.3.3.4)."""
    name = keyword.encode("latin-1")
    try:
        return b"tEXt", name + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        return b"iTXt", name + b"\0\0\0\0\0" + text.encode()


def _filtered(rows_HE: np.ndarray, above_E: np.ndarray | None) -> np.ndarray:
    """Each row with the filter that leaves the smallest differences (section 12.7), after its filter's number."""
    import numpy as np

    pixel = 3
    before_HE = np.zeros_like(rows_HE)
    before_HE[:, pixel:] = rows_HE[:, :-pixel]
    up_HE = np.zeros_like(rows_HE)
    up_HE[1:] = rows_HE[:-1]
    if above_E is not None:
        up_HE[0] = above_E
    diagonal_HE = np.zeros_like(rows_HE)
    diagonal_HE[:, pixel:] = up_HE[:, :-pixel]
    average_HE = ((before_HE.astype(np.uint16) + up_HE) >> 1).astype(np.uint8)
    guesses = (np.zeros_like(rows_HE), before_HE, up_HE, average_HE, _paeth(before_HE, up_HE, diagonal_HE))
    best_HE = np.empty((len(rows_HE), rows_HE.shape[1] + 1), dtype=np.uint8)
    least_H = np.full(len(rows_HE), np.iinfo(np.int64).max)
    for number, guess_HE in enumerate(guesses):
        left_HE = rows_HE - guess_HE
        size_H = np.abs(left_HE.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)
        better_H = size_H < least_H
        best_HE[better_H, 0], best_HE[better_H, 1:], least_H[better_H] = number, left_HE[better_H], size_H[better_H]
    return best_HE


def _paeth(left: np.ndarray, up: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Of left, up and diagonal neighbours the one nearest to left + up - diagonal (section 9.4)."""
    import numpy as np

    to_left = np.abs(up.astype(np.int16) - diagonal)
    to_up = np.abs(left.astype(np.int16) - diagonal)
    to_diagonal = np.abs(left.astype(np.int16) + up - 2 * diagonal.astype(np.int16))
    not_left = np.where(to_up <= to_diagonal, up, diagonal)
    return np.where((to_left <= to_up) & (to_left <= to_diagonal), left, not_left)
