"""What a user sets for row streaming, and what a run will take."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass

from lowtide.memory.rule import Tier
from lowtide.sizes import format_decimal, parse_bytes


@dataclass(frozen=True)
class RowSettings:
    """Where rows rest, and how much memory row streaming may take; sizes in bytes.

    `rows` is the tier where rows rest: DEVICE, HOST or DISK; None takes the first of these with room. `budget` limits
    the memory of the device: rows that rest on it and bands at work together. `work` limits the bands at work; None
    goes by the width of the rows. `folder` is the folder of the nameless file for rows on disk; None is the system's
    temporary folder.
    """

    rows: Tier | None = None
    budget: int | None = None
    work: int | None = None
    folder: str | os.PathLike[str] | None = None

    @classmethod
    def of(
        cls,
        rows: Tier | str | None = None,
        budget: int | str | None = None,
        work: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> RowSettings:
        """Settings as users write them; raises `ValueError` for settings that are not possible."""
        if rows is not None and rows not in list(Tier):
            raise ValueError(
                f"rows={rows!r} is not possible: give 'device', 'host' or 'disk', or None for the first with room."
            )
        if folder is not None:
            _check_folder(folder)
        sizes = [None if size is None else parse_bytes(size) for size in (budget, work)]
        return cls(None if rows is None else Tier(rows), sizes[0], sizes[1], folder)


@dataclass(frozen=True)
class RowForecast:
    """What a run will take, before it begins: where rows rest, bytes of rows stored and of bands at work, passes."""

    rows: Tier
    stored: int
    work: int
    passes: int

    @property
    def peak(self) -> int:
        """Bytes in the memory of the device, without the output, the copies of a pass's weights and the workspace of
        convolutions.
        """
        return self.work + (self.stored if self.rows is Tier.DEVICE else 0)


def _check_folder(folder: object) -> None:
    if not isinstance(folder, (str, os.PathLike)) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"folder={folder!r} is not possible: give an existing folder that can be written to, or None.")


def check_disk(nbytes: int, folder: str | os.PathLike[str] | None) -> None:
    """Raise `OSError` for a disk that is too small before an hour of work, not after it."""
    place = folder or tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(
            f"{format_decimal(nbytes)} of rows do not fit in {place} (free: {format_decimal(free)}). Choose another "
            "folder, a smaller picture, or half precision."
        )
