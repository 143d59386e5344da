"""What came of a run: files that are whole or not there, and figures of what it took."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

import lowtide
from lowtide.guests.results import results_of
from lowtide.media.unfinished import whole_or_not
from lowtide.utils import export_to_video

FPS = 8
"""Frames a second of clips, as their published models make them."""
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

    def write(self, output: Any, place: int) -> Image.Image | None:
        """Write what came out as this result, and return its picture, or the first frame of its clip.

        Of several pictures or clips the first is written last, so that it tells that all are there.
        """
        results = results_of(output)
        for number, picture in reversed(list(enumerate(results.pictures))):
            with whole_or_not(self._file(place, ".png", number)) as unfinished:
                picture.save(unfinished, format="PNG")
        for number, clip in reversed(list(enumerate(results.clips))):
            export_to_video(clip, str(self._file(place, ".mp4", number)), fps=FPS)
        shutil.rmtree(self.kept(place), ignore_errors=True)
        first = next(iter(results.pictures), None) or next((clip[0] for clip in results.clips), None)
        return first if isinstance(first, Image.Image) else None

    def _file(self, place: int, suffix: str, number: int = 0) -> Path:
        return self._folder / (f"{place}-{number}{suffix}" if number else f"{place}{suffix}")


def stage_figures(pipe: Any) -> list[dict[str, Any]]:
    """What each stage of a pipeline's last call took, beside its plan."""
    return [{name: getattr(stage, name) for name in FIGURES} for stage in lowtide.report(pipe).stages]


def most_of(taken: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The highest measured peak of several calls, and what the stages of the call with it took; {} of none."""
    if not taken:
        return {}
    peaks = [max((stage["peak"] or 0 for stage in stages), default=0) for stages in taken]
    return {"measured": max(peaks), "taken": taken[peaks.index(max(peaks))]}
