"""What came of a run: files that are whole or not there, and figures of what it took."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import lowtide
from lowtide.guests.results import results_of
from lowtide.media.unfinished import whole_or_not
from lowtide.serve.job import FPS
from lowtide.utils import export_to_video

SUFFIXES = (".png", ".mp4")
FIGURES = ("name", "predicted_peak", "peak", "predicted_seconds", "seconds", "moved", "stalled")


class MadeFiles:
    """The results of a run in a folder, called by their places; beside them what is kept of unfinished ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, place: int) -> bool:
        return any(self._file(place, suffix).exists() for suffix in SUFFIXES)

    @property
    def names(self) -> list[str]:
        """Of all results, in order."""
        found = (file for suffix in SUFFIXES for file in self._folder.glob(f"*{suffix}"))
        return [file.name for file in sorted(found, key=lambda file: [int(part) for part in file.stem.split("-")])]

    def kept(self, place: int) -> Path:
        """A folder for what is kept until this result is there."""
        return self._folder / f"kept-{place}"

    def write(self, place: int, suffix: str, values: Sequence[Any]) -> None:
        """Write the pictures or clips of a place, the first one last, so that it tells that all are there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, value in reversed(list(enumerate(values))):
            _write(value, self._file(place, suffix, number))
        shutil.rmtree(self.kept(place), ignore_errors=True)

    def _file(self, place: int, suffix: str, number: int = 0) -> Path:
        return self._folder / (f"{place}-{number}{suffix}" if number else f"{place}{suffix}")


def write_all(output: Any, places: Sequence[tuple[MadeFiles, int]]) -> Image.Image | None:
    """Write what came out of a call as the results of these places, and return the first picture or frame."""
    results = results_of(output)
    for suffix, values in ((".png", results.pictures), (".mp4", results.clips)):
        each = len(values) // len(places)
        for (made, place), begin in zip(places, range(0, len(values), each or 1), strict=False):
            made.write(place, suffix, values[begin : begin + each])
    first = next(iter(results.pictures), None) or next((clip[0] for clip in results.clips), None)
    return first if isinstance(first, Image.Image) else None


def _write(value: Any, file: Path) -> None:
    if isinstance(value, Image.Image):
        with whole_or_not(file) as unfinished:
            value.save(unfinished, format="PNG")
    else:
        export_to_video(value, str(file), fps=FPS)


def stage_figures(pipe: Any) -> list[dict[str, Any]]:
    """What each stage of a pipeline's last call took, beside its plan."""
    return [{name: getattr(stage, name) for name in FIGURES} for stage in lowtide.report(pipe).stages]


def most_of(taken: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The highest measured peak of several calls, and what the stages of the call with it took; {} of none."""
    if not taken:
        return {}
    peaks = [max((stage["peak"] or 0 for stage in stages), default=0) for stages in taken]
    return {"measured": max(peaks), "taken": taken[peaks.index(max(peaks))]}
