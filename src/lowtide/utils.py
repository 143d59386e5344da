"""`export_to_video`, which writes frames as an H.264 video, under the name that existing scripts import."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowtide.hub import local_path
from lowtide.media.unfinished import whole_or_not
from lowtide.media.video_file import Frames, rgb_frames

if TYPE_CHECKING:
    import av
    from av.container import OutputContainer
    from av.video.stream import VideoStream

_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
_MOST_FPS = 1000
_LONGEST_SIDE = 16384  # x264's limit
_WORST_CRF = 51
# Numbers of ITU-T H.273. BT.709 stands for the primaries, the transfer and a matrix, BT.601 for a matrix alone.
_BT709, _BT601 = 1, 6
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class _Encoding:
    """How to encode: frames a second, and either a constant rate factor (None: x264's own) or bits a second."""

    fps: Fraction
    crf: int | None
    bitrate: int | None


def export_to_video(
    video_frames: Frames,
    output_video_path: str | os.PathLike[str] | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write a video as H.264 (yuv420p, MP4 with its index first), which ordinary players open, and return its path.

    `video_frames` are PIL images, or arrays or tensors `[H, W, 3]` (uint8, or floats in [0, 1]), in a list or any
    iterable, which is read one frame at a time; or one array or tensor `[F, H, W, 3]`. `output_video_path` ends in
    .mp4, .mov or .mkv; an existing file is replaced once the new one is whole. `None` makes a temporary .mp4. `fps` are
    frames a second. `quality` goes from 0, the worst, to 10, and sets the constant rate factor to 51 - 5.1 `quality`,
    but no lower than 1; `None` leaves it to x264. `bitrate`, in bits a second, takes the place of `quality`. Frames are
    never resized; 4:2:0 needs even sides, so an odd side gets a copy of its last row or column. `macro_block_size`, to
    whose multiples other software stretches frames, is accepted and has no effect.

    Raises `ValueError` for no frames, for frames of several sizes, of another shape or dtype or with NaN, and for
    arguments that are not possible; `FileNotFoundError` if the folder is missing; `ImportError` without PyAV;
    `RuntimeError` if PyAV lacks H.264; `OSError` if the file cannot be written. After an error no file is left or
    changed.
    """
    encoding = _encoding(fps, quality, bitrate, macro_block_size)
    path = None if output_video_path is None else _output_path(output_video_path)
    _check_encoder()
    if path is not None:
        _write(video_frames, path, encoding)
        return str(path)
    handle, name = tempfile.mkstemp(prefix="lowtide-", suffix=".mp4")
    os.close(handle)
    try:
        _write(video_frames, Path(name), encoding)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return name


def _encoding(fps: float, quality: float | None, bitrate: int | None, macro_block_size: int | None) -> _Encoding:
    if not _is_number(fps) or not 1 / _MOST_FPS <= fps <= _MOST_FPS:
        raise ValueError(f"fps={fps!r} is not possible: give frames a second, from {1 / _MOST_FPS:g} to {_MOST_FPS}.")
    if quality is not None and not (_is_number(quality) and 0 <= quality <= 10):
        raise ValueError(f"quality={quality!r} is not possible: choose from 0, the worst, to 10, the best.")
    for name, value in (("bitrate", bitrate), ("macro_block_size", macro_block_size)):
        if value is not None and not (_is_number(value) and value >= 1):
            raise ValueError(f"{name}={value!r} is not possible: give a whole number from 1, or None.")
    # A factor of 0 is lossless, in a profile that few players support.
    crf = None if quality is None or bitrate is not None else max(1, int((1 - quality / 10) * _WORST_CRF))
    return _Encoding(Fraction(float(fps)).limit_denominator(100_000), crf, None if bitrate is None else int(bitrate))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Fraction, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _output_path(given: str | os.PathLike[str]) -> Path:
    if not isinstance(given, (str, os.PathLike)) or "\0" in os.fspath(given):
        raise ValueError(f"output_video_path={given!r:.80} cannot be the name of a file.")
    path = local_path(given)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file as output_video_path.")
    if path.suffix.lower() not in _CONTAINERS:
        gif = " For a GIF save PIL images with save_all=True." if path.suffix.lower() == ".gif" else ""
        raise ValueError(
            f"{path}: videos are written as {', '.join(_CONTAINERS)}. Give a name with such an ending.{gif}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it, or give another output_video_path.")
    return path


def _check_encoder() -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos are written with PyAV, which is not installed: pip install av") from error
    if "libx264" not in av.codecs_available:
        raise RuntimeError(
            "This PyAV was built with an FFmpeg that lacks the H.264 encoder libx264. Install a PyAV that brings its "
            "own FFmpeg: pip install --force-reinstall --only-binary=:all: av"
        )


def _write(video_frames: Frames, path: Path, encoding: _Encoding) -> None:
    frames = _even_frames(video_frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("A video needs at least one frame; none was given.")
    height, width = first.shape[:2]
    if max(height, width) > _LONGEST_SIDE:
        raise ValueError(f"Frames of {width}x{height} pixels are too large: up to {_LONGEST_SIDE} along each side.")
    import av

    form = _CONTAINERS[path.suffix.lower()]
    options = {} if form == "matroska" else {"movflags": "+faststart"}
    with whole_or_not(path) as unfinished, av.open(str(unfinished), "w", format=form, options=options) as container:
        stream = _video_stream(container, first, encoding)
        for number, pixels_HW3 in enumerate(itertools.chain([first], frames)):
            container.mux(stream.encode(_coded_frame(pixels_HW3, number, stream)))
        container.mux(stream.encode(None))


def _even_frames(video_frames: Frames) -> Iterator[np.ndarray]:
    for pixels_HW3 in rgb_frames(video_frames):
        height, width = pixels_HW3.shape[:2]
        odd = height % 2 or width % 2
        yield np.pad(pixels_HW3, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if odd else pixels_HW3


def _video_stream(container: OutputContainer, first_HW3: np.ndarray, encoding: _Encoding) -> VideoStream:
    stream = container.add_stream("libx264", rate=encoding.fps)
    coder = stream.codec_context
    coder.height, coder.width = first_HW3.shape[:2]
    coder.pix_fmt, coder.time_base = "yuv420p", 1 / encoding.fps
    coder.color_primaries = coder.color_trc = _BT709
    coder.colorspace, coder.color_range = _matrix(coder.width, coder.height), _LIMITED_RANGE
    if encoding.crf is not None:
        coder.options = {"crf": str(encoding.crf)}
    if encoding.bitrate is not None:
        coder.bit_rate = encoding.bitrate
    return stream


def _matrix(width: int, height: int) -> int:
    """The matrix that players assume for a size if they ignore the one that the file names."""
    return _BT709 if width >= 1280 or height > 576 else _BT601


def _coded_frame(pixels_HW3: np.ndarray, number: int, stream: VideoStream) -> av.VideoFrame:
    import av
    from av.video.reformatter import Colorspace, Interpolation

    coder = stream.codec_context
    matrix = Colorspace.ITU709 if coder.colorspace == _BT709 else Colorspace.ITU601
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HW3), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=matrix, dst_color_range="MPEG", interpolation=exact
    )
    frame.pts, frame.time_base = number, coder.time_base
    return frame
