"""The frames of a video: read as 8-bit RGB from what pipelines and users have, and shown side by side on one sheet."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lowtide.whole_numbers import whole

Frames = Any
"""PIL images or arrays `[H, W, 3]` (uint8, or floats in [0, 1]) in any iterable, or one array `[F, H, W, 3]`."""

SLACK = 1e-3
"""By so much may floats leave [0, 1], as those of half precision do."""

_BACKGROUND, _BRIGHT, _DIM = (22, 23, 26), (226, 228, 232), (138, 142, 150)
_MARGIN, _GAP, _CAPTION, _TEXT = 28, 20, 30, 15
_SMALLEST_CELL = 96
_SHAPE_OF_SHEETS = 1.6  # width to height, where the number of columns is free


def rgb_frames(frames: Frames) -> Iterator[np.ndarray]:
    """The frames of one video, uint8 `[H, W, 3]`, one at a time as they are asked for.

    Raises `ValueError`, with the number of the frame, for what is no picture of a supported kind (see `rgb_frame`) and
    for a frame that is not as large as the first.
    """
    first: np.ndarray | None = None
    for number, frame in enumerate(_checked(frames)):
        pixels_HW3 = rgb_frame(frame, number)
        first = pixels_HW3 if first is None else first
        _check_same_size(pixels_HW3, first, number)
        yield pixels_HW3


def rgb_frame(frame: Any, number: int = 0) -> np.ndarray:
    """One frame as uint8 `[H, W, 3]`; floats are rounded to the nearest of 256 levels. `number` is told in errors.

    Raises `ValueError` for another shape or dtype, for NaN, and for floats outside [0, 1].
    """
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    if _is_tensor(frame):
        frame = (frame.float() if frame.is_floating_point() else frame).detach().cpu().numpy()
    if not isinstance(frame, np.ndarray):
        hint = ": one video is wanted, so give frames[0]" if isinstance(frame, (list, tuple)) else ""
        raise ValueError(f"Frame {number} is a {type(frame).__name__}, not a PIL image or an array [H, W, 3]{hint}.")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"Frame {number} has the shape {list(frame.shape)}, not [H, W, 3]{_shape_hint(frame)}.")
    if frame.dtype == np.uint8:
        return frame
    if not np.issubdtype(frame.dtype, np.floating):
        raise ValueError(f"Frame {number} has the dtype {frame.dtype}: give uint8, or floats in [0, 1].")
    return _rounded(frame.astype(np.float32, copy=False), number)


def contact_sheet(
    frames: Frames, columns: int | None = None, *, count: int = 12, fps: float | None = None, cell: int = 320
) -> Image.Image:
    """A sheet with up to `count` frames of one video, evenly spread from the first to the last, as an RGB PIL image.

    `frames` as in `export_to_video` (an iterator is read to its end). Each frame fills a cell of `cell` pixels along
    its longer side and has its number, from 1, below it, and its time in seconds if `fps` (frames a second) is given.
    `columns` are chosen for a wide sheet unless given. Raises `ValueError` for numbers that are not possible, and for
    frames that are missing, of several sizes, or of another kind.
    """
    _check_sheet(columns, count, fps, cell)
    every = _checked(frames)
    sequence: Any = every if isinstance(every, Sequence) or hasattr(every, "shape") else list(every)
    numbers = spread_numbers(len(sequence), count)
    if not numbers:
        raise ValueError("A sheet needs at least one frame; none was given.")
    chosen = [rgb_frame(sequence[number], number) for number in numbers]
    for number, pixels_HW3 in zip(numbers, chosen, strict=True):
        _check_same_size(pixels_HW3, chosen[0], number)
    thumbnails = [_thumbnail(pixels_HW3, cell) for pixels_HW3 in chosen]
    captions = [
        (f"{number + 1} / {len(sequence)}", "" if fps is None else f"{number / fps:.2f} s") for number in numbers
    ]
    return _sheet(thumbnails, captions, min(columns or _columns(thumbnails), len(thumbnails)))


def spread_numbers(total: int, count: int) -> list[int]:
    """Up to `count` whole numbers, evenly spread from 0 to `total` - 1."""
    return sorted({round(number) for number in np.linspace(0, total - 1, min(total, count))})


def _checked(frames: Frames) -> Iterable[Any]:
    if _is_tensor(frames) or isinstance(frames, np.ndarray):
        if frames.ndim != 4:
            what = "several videos: give frames[0]" if frames.ndim == 5 else "no video"
            raise ValueError(f"Frames of the shape {list(frames.shape)} are {what}. One video is [F, H, W, 3].")
        return frames
    if isinstance(frames, (str, bytes, dict, Image.Image)) or not isinstance(frames, Iterable):
        raise ValueError(
            f"Frames are a {type(frames).__name__}: give a list of PIL images or of arrays [H, W, 3], or one array "
            "[F, H, W, 3]."
        )
    return frames


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # where there is a tensor, it has been imported
    return torch is not None and isinstance(value, torch.Tensor)


def _shape_hint(frame: np.ndarray) -> str:
    if frame.ndim == 3 and frame.shape[0] == 3:
        return ": its channels come first, so move them last"
    if frame.ndim == 3 and frame.shape[2] in (1, 4):
        return f": it has {frame.shape[2]} channels, and red, green and blue are wanted"
    return ": one video is wanted, so give frames[0]" if frame.ndim == 4 else ""


def _rounded(frame_HW3: np.ndarray, number: int) -> np.ndarray:
    low, high = float(frame_HW3.min()), float(frame_HW3.max())
    if not math.isfinite(low) or not math.isfinite(high):  # NaN is passed on by min and max
        raise ValueError(f"Frame {number} holds NaN or infinity: nothing can be shown there. Was the model's float16?")
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"Frame {number} holds floats from {low:.4g} to {high:.4g}, which must be in [0, 1]: divide by 255, or "
            "from [-1, 1] take x / 2 + 0.5."
        )
    return (frame_HW3.clip(0, 1) * 255).round().astype(np.uint8)


def _check_same_size(pixels_HW3: np.ndarray, first_HW3: np.ndarray, number: int) -> None:
    (height, width), (first_height, first_width) = pixels_HW3.shape[:2], first_HW3.shape[:2]
    if (height, width) != (first_height, first_width):
        raise ValueError(
            f"Frame {number} is {width}x{height} pixels and the first {first_width}x{first_height}: all frames of a "
            "video must be of one size."
        )


def _check_sheet(columns: int | None, count: int, fps: float | None, cell: int) -> None:
    for name, value, least in (("columns", columns, 1), ("count", count, 1), ("cell", cell, _SMALLEST_CELL)):
        if value is not None and (whole(value) or 0) < least:
            raise ValueError(f"{name}={value!r} is not possible: give a whole number from {least}.")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps={fps!r} is not possible: give the frames a second, a number above 0.")


def _thumbnail(pixels_HW3: np.ndarray, cell: int) -> Image.Image:
    height, width = pixels_HW3.shape[:2]
    factor = cell / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return Image.fromarray(pixels_HW3).resize(size, Image.Resampling.LANCZOS)


def _columns(thumbnails: Sequence[Image.Image]) -> int:
    """The number of columns whose sheet has few empty cells and is nearest to a wide rectangle."""
    count = len(thumbnails)
    width, height = _cell_size(thumbnails[0])

    def badness(columns: int) -> float:
        rows = -(-count // columns)
        shape = columns * width / (rows * height)
        return abs(math.log(shape / _SHAPE_OF_SHEETS)) + 1.5 * (rows * columns - count) / count

    return min(range(1, count + 1), key=badness)


def _cell_size(thumbnail: Image.Image) -> tuple[int, int]:
    return max(thumbnail.width, _SMALLEST_CELL) + _GAP, thumbnail.height + _CAPTION + _GAP


def _sheet(thumbnails: Sequence[Image.Image], captions: Sequence[tuple[str, str]], columns: int) -> Image.Image:
    width, height = _cell_size(thumbnails[0])
    rows = -(-len(thumbnails) // columns)
    sheet = Image.new("RGB", (columns * width - _GAP + 2 * _MARGIN, rows * height - _GAP + 2 * _MARGIN), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for place, (thumbnail, (number, time)) in enumerate(zip(thumbnails, captions, strict=True)):
        left, top = _MARGIN + place % columns * width, _MARGIN + place // columns * height
        sheet.paste(thumbnail, (left + (width - _GAP - thumbnail.width) // 2, top))
        middle = top + thumbnail.height + _CAPTION // 2 + 2
        draw.text((left + 1, middle), number, _BRIGHT, font, anchor="lm")
        draw.text((left + width - _GAP - 1, middle), time, _DIM, font, anchor="rm")
    return sheet
