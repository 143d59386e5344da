"""What came out of a foreign pipeline's call, in whatever form: pictures, clips, sound, and what else there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lowtide.guests.sounds import SOUNDS, sounds_in
from lowtide.media.video_file import rgb_frame

_PICTURES, _CLIPS = ("images", "prediction"), "frames"
_CHANNELS = (1, 3, 4)
_RANKS = {"picture": 3, "clip": 4}
"""Axes of an array that is one picture, and of one that is one clip."""


@dataclass(frozen=True)
class Results:
    """Pictures (8-bit PIL images), clips (each a list of frames as `lowtide.media.video_file` takes them), the names of
    results of other kinds, and sounds (`[channels, time]`, floats in [-1, 1]).
    """

    pictures: tuple[Image.Image, ...]
    clips: tuple[list[Any], ...]
    others: tuple[str, ...]
    sounds: tuple[np.ndarray, ...] = ()


def results_of(output: Any) -> Results:
    """What a call returned: an object with `images`, `frames` or sound, or the pictures themselves.

    Pictures may be PIL images, arrays `[H, W, C]` or tensors `[C, H, W]` in [0, 1] or uint8, in lists or along further
    axes; clips have one axis more. Raises `ValueError` for what is none of these, and for values that are no colours.
    """
    if not any(hasattr(output, name) for name in (*_PICTURES, _CLIPS, *SOUNDS)):
        return Results(tuple(map(_picture, _each(output, "picture", type(output).__name__))), (), ())
    fields = dict(output) if isinstance(output, Mapping) else vars(output)
    sounds = {name: heard for name in SOUNDS if (heard := sounds_in(getattr(output, name, None))) is not None}
    written = (*_PICTURES, _CLIPS, *sounds)
    pictures = [getattr(output, name) for name in _PICTURES if getattr(output, name, None) is not None]
    clips = getattr(output, _CLIPS, None)
    return Results(
        tuple(_picture(picture) for many in pictures for picture in _each(many, "picture", "images")),
        ()
        if clips is None
        else tuple([_channels_last(frame) for frame in clip] for clip in _each(clips, "clip", _CLIPS)),
        tuple(name for name, value in fields.items() if value is not None and name not in written),
        tuple(sound for heard in sounds.values() for sound in heard),
    )


def _each(values: Any, kind: str, name: str) -> Iterator[Any]:
    """The pictures in nested lists and along axes, or the clips, which are the innermost lists and axes of pictures."""
    if isinstance(values, Image.Image) or getattr(values, "ndim", None) == _RANKS["picture"]:
        if kind == "clip":
            raise ValueError(f"{name} holds a picture where frames were expected.")
        yield values
    elif hasattr(values, "ndim"):
        yield from _along(values, kind, name)
    elif isinstance(values, list | tuple):
        if kind == "clip" and values and all(_is_picture(value) for value in values):
            yield values
            return
        for value in values:
            yield from _each(value, kind, name)
    else:
        raise ValueError(f"{name} is a {type(values).__name__}, which is neither pictures nor frames.")


def _along(values: Any, kind: str, name: str) -> Iterator[Any]:
    rank = values.ndim
    if rank < _RANKS[kind]:
        raise ValueError(f"{name} has the shape {list(values.shape)}, which is no {kind}.")
    if rank == _RANKS[kind]:
        yield values
        return
    for value in values:
        yield from _along(value, kind, name)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or getattr(value, "ndim", None) == _RANKS["picture"]


def _picture(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value if value.mode in ("RGB", "RGBA", "L") else value.convert("RGB")
    return Image.fromarray(rgb_frame(_channels_last(value)))


def _channels_last(frame: Any) -> Any:
    """A frame as a view `[H, W, 3]`, if it has one channel or three; PIL images as they are."""
    if isinstance(frame, Image.Image):
        return frame
    if hasattr(frame, "detach"):
        last = frame.movedim(0, -1) if frame.shape[0] in _CHANNELS else frame
        return last.expand(-1, -1, 3) if last.shape[-1] == 1 else last
    pixels = np.asarray(frame)
    last = np.moveaxis(pixels, 0, -1) if pixels.shape[-1] not in _CHANNELS and pixels.shape[0] in _CHANNELS else pixels
    return np.broadcast_to(last, (*last.shape[:2], 3)) if last.shape[-1] == 1 else last
