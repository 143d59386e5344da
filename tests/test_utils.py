"""Videos written as H.264: what is read back, what is refused, and that a file is there whole or not at all."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowtide.utils import export_to_video

av = pytest.importorskip("av")

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (51, 128, 204), (250, 200, 40)]
COLOUR_TOLERANCE = 4  # of 255, in the middle of a plain area; the wrong matrix is off by 20 and more


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()


def clip(count=6, height=32, width=48):
    """Frames that are each of one colour, uint8 `[F, H, W, 3]`."""
    colours = np.array([COLOURS[number % len(COLOURS)] for number in range(count)], dtype=np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def decoded(path):
    """The stream's facts and the frames as uint8 `[F, H, W, 3]`."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        coder = stream.codec_context
        tags = coder.colorspace, coder.color_range, coder.color_primaries, coder.color_trc
        facts = {
            "codec": coder.name,
            "pix_fmt": coder.pix_fmt,
            "profile": coder.profile,
            "fps": stream.average_rate,
            "seconds": container.duration / av.time_base,
            "tags": tuple(map(int, tags)),
            "times": [frame.time for frame in frames],
        }
        return facts, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def worst_colour(found, expected):
    height, width = expected.shape[1] // 2, expected.shape[2] // 2
    return np.abs(found[:, height, width].astype(int) - expected[:, height, width]).max()


FORMS = {
    "uint8 array": lambda frames: frames,
    "float array": lambda frames: frames.astype(np.float32) / 255,
    "float64 arrays": lambda frames: list(frames / 255),
    "uint8 arrays": list,
    "pictures": lambda frames: [Image.fromarray(frame) for frame in frames],
    "tuple of pictures": lambda frames: tuple(Image.fromarray(frame) for frame in frames),
    "float tensor": lambda frames: torch.from_numpy(frames).float() / 255,
    "uint8 tensor": torch.from_numpy,
    "bfloat16 tensors": lambda frames: [one.bfloat16() / 255 for one in torch.from_numpy(frames)],
    "tensor with a gradient": lambda frames: (torch.from_numpy(frames).float() / 255).requires_grad_(),
    "generator": lambda frames: (frame for frame in frames),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back(form):
    frames = clip()
    assert export_to_video(FORMS[form](frames), "x.mp4", fps=8) == "x.mp4"
    facts, found = decoded("x.mp4")
    assert found.shape == frames.shape
    assert (facts["codec"], facts["pix_fmt"], facts["fps"]) == ("h264", "yuv420p", 8)
    assert facts["seconds"] == pytest.approx(6 / 8)
    assert facts["times"] == [number / 8 for number in range(6)]
    assert worst_colour(found, frames) <= COLOUR_TOLERANCE
    assert worst_colour(found[::-1], frames) > 20  # negative control
    assert os.listdir() == ["tmp", "x.mp4"] or os.listdir() == ["x.mp4", "tmp"]


@pytest.mark.parametrize(("size", "matrix"), [((480, 720), 6), ((720, 1280), 1), ((640, 360), 1)])
def test_colours_are_right_and_told_at_any_size(size, matrix):
    """By its size a player that does not heed the tags takes BT.601 (6) or BT.709 (1): the file agrees with both."""
    frames = clip(2, *size)
    export_to_video(frames, "x.mp4")
    facts, found = decoded("x.mp4")
    assert facts["tags"] == (matrix, 1, 1, 1)
    assert worst_colour(found, frames) <= COLOUR_TOLERANCE


@pytest.mark.parametrize("size", [(33, 48), (32, 47), (31, 45), (1, 1)])
def test_odd_sides_get_one_more_row_or_column_and_nothing_is_stretched(size):
    height, width = size
    y, x = np.mgrid[:height, :width]
    frame = np.stack([y * 255 // height, x * 255 // width, 0 * x + 90], axis=2).astype(np.uint8)
    export_to_video([frame] * 3, "x.mp4", quality=10)
    _, found = decoded("x.mp4")
    assert found.shape[1:3] == (height + height % 2, width + width % 2)
    padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(int)
    assert np.abs(found[1] - padded).mean() < 4


@pytest.mark.parametrize("fps", [1, 10, 24, 29.97, 0.5, Fraction(30000, 1001), np.float32(12.5)])
def test_frames_a_second(fps):
    export_to_video(clip(4), "x.mp4", fps=fps)
    facts, _ = decoded("x.mp4")
    assert float(facts["fps"]) == pytest.approx(float(fps), rel=1e-6)
    assert facts["seconds"] == pytest.approx(4 / float(fps), rel=1e-3)


def test_one_frame_makes_a_video():
    export_to_video(clip(1), "x.mp4", fps=8)
    facts, found = decoded("x.mp4")
    assert len(found) == 1
    assert facts["seconds"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".MP4"])
def test_containers(suffix):
    path = Path(f"name with:colon %d é{suffix}")
    assert export_to_video(clip(), path) == str(path)
    facts, found = decoded(str(path))
    assert (facts["codec"], len(found)) == ("h264", 6)


def test_the_index_comes_first():
    """So that a player on the other end of a link can begin before it has the whole file."""
    content = Path(export_to_video(clip(), "x.mp4")).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_better_quality_is_nearer_and_larger():
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    sizes, errors = [], []
    for quality in (0, 5.0, 10):
        path = export_to_video(noise, f"{quality}.mp4", quality=quality)
        facts, found = decoded(path)
        assert facts["profile"] == "High"  # also at 10: x264's lossless profile opens in few players
        sizes.append(Path(path).stat().st_size)
        errors.append(np.abs(found.astype(int) - noise).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert sizes[0] < sizes[2] / 4


def test_a_bitrate_takes_the_place_of_quality():
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 96, 3), dtype=np.uint8)
    low, high = (export_to_video(noise, f"{rate}.mp4", bitrate=rate) for rate in (100_000, 1_000_000))
    assert Path(low).stat().st_size < Path(high).stat().st_size / 2
    for options in ({"quality": None}, {"macro_block_size": None}, {"macro_block_size": 1}, {"macro_block_size": 32}):
        assert decoded(export_to_video(clip(), "x.mp4", **options))[1].shape == (6, 32, 48, 3)


def test_a_temporary_file_where_no_name_is_given():
    first, second = export_to_video(clip()), export_to_video(clip())
    assert first != second
    assert first.endswith(".mp4")
    assert len(decoded(first)[1]) == 6
    with pytest.raises(ValueError, match="at least one frame"):
        export_to_video([])
    assert len(os.listdir("tmp")) == 2


def test_frames_are_taken_one_at_a_time():
    """No frame is held when the next one is asked for, beyond the last."""
    alive = []

    class Frame(np.ndarray):
        def __del__(self):
            alive.remove(id(self))

    def frames():
        for number in range(20):
            frame = clip(1)[0].view(Frame)
            alive.append(id(frame))
            assert len([one for one in alive if one]) <= 4, number
            yield frame

    assert len(decoded(export_to_video(frames(), "x.mp4"))[1]) == 20


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full"), ValueError("mine")])
def test_the_old_video_stays_until_the_new_one_is_whole(error):
    export_to_video(clip(), "x.mp4")
    before = Path("x.mp4").read_bytes()

    def interrupted():
        yield from clip(200)
        assert len([name for name in os.listdir() if name.endswith(".tmp")]) == 1
        raise error

    for path in ("x.mp4", "new.mp4", None):
        with pytest.raises(type(error)):
            export_to_video(interrupted() if path else broken(error), path)
    assert sorted(os.listdir()) == ["tmp", "x.mp4"]
    assert os.listdir("tmp") == []
    assert Path("x.mp4").read_bytes() == before


def broken(error):
    yield clip(1)[0]
    raise error


def test_a_link_stays_one_and_nothing_is_printed(capfd):
    Path("real.mp4").touch()
    Path("link.mp4").symlink_to("real.mp4")
    export_to_video(clip(), "link.mp4")
    assert Path("link.mp4").is_symlink()
    assert len(decoded("real.mp4")[1]) == 6
    assert capfd.readouterr() == ("", "")


def with_value(value):
    frames = clip(3).astype(np.float32) / 255
    frames[1, 2, 3, 0] = value
    return frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        (iter(()), "at least one frame"),
        (np.zeros((0, 8, 8, 3)), "at least one frame"),
        ([clip()[0], clip(height=30)[0]], "Frame 1 is 48x30 pixels and the first 48x32"),
        (with_value(np.nan), "Frame 1 holds NaN"),
        (with_value(-np.inf), "Frame 1 holds NaN or infinity"),
        (with_value(1.5), r"from 0 to 1\.5.* divide by 255"),
        (with_value(-1), r"x / 2 \+ 0\.5"),
        (torch.full((1, 8, 8, 3), torch.nan, dtype=torch.bfloat16), "Frame 0 holds NaN"),
        (clip().astype(np.int64), "dtype int64: give uint8, or floats"),
        (np.moveaxis(clip(), -1, 1), r"\[3, 32, 48\].*channels come first"),
        (clip()[..., :1], "it has 1 channels"),
        ([np.zeros((8, 8, 4))], "it has 4 channels"),
        ([np.zeros((8, 8))], r"shape \[8, 8\], not \[H, W, 3\]"),
        ([np.zeros((0, 8, 3))], r"shape \[0, 8, 3\]"),
        (clip()[0], r"shape \[32, 48, 3\] are no video"),
        (clip()[None], r"several videos: give frames\[0\]"),
        (torch.from_numpy(clip())[None], r"several videos: give frames\[0\]"),
        ([clip()], r"give frames\[0\]"),
        ([[Image.new("RGB", (8, 8))]], r"Frame 0 is a list.*give frames\[0\]"),
        (["a.png"], "Frame 0 is a str"),
        ("a.mp4", "Frames are a str: give a list"),
        (Image.new("RGB", (8, 8)), "Frames are a Image"),
        (None, "Frames are a NoneType"),
        ([np.zeros((2, 16386, 3), dtype=np.uint8)], "16386x2 pixels are too large"),
    ],
)
def test_frames_that_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        export_to_video(frames, "x.mp4")
    assert os.listdir() == ["tmp"]


def never():
    raise AssertionError("a frame was asked for")
    yield


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fps": 0}, ValueError, "fps=0 is not possible"),
        ({"fps": -8}, ValueError, "fps=-8"),
        ({"fps": float("nan")}, ValueError, "fps=nan"),
        ({"fps": "8"}, ValueError, "fps='8'"),
        ({"fps": 10**6}, ValueError, "up to|to 1000"),
        ({"quality": 11}, ValueError, "quality=11 .* from 0, the worst, to 10"),
        ({"quality": -0.1}, ValueError, r"quality=-0\.1"),
        ({"bitrate": 0}, ValueError, "bitrate=0"),
        ({"macro_block_size": -1}, ValueError, "macro_block_size=-1"),
        ({"output_video_path": "x.gif"}, ValueError, r"\.mp4, \.mov, \.mkv.*For a GIF"),
        ({"output_video_path": "x"}, ValueError, "Give a name with such an ending"),
        ({"output_video_path": "a\0.mp4"}, ValueError, "cannot be the name of a file"),
        ({"output_video_path": 7}, ValueError, "cannot be the name of a file"),
        ({"output_video_path": "missing/x.mp4"}, FileNotFoundError, "missing is not a folder: create it"),
        ({"output_video_path": "folder.mp4"}, IsADirectoryError, "is a folder"),
    ],
)
def test_arguments_are_refused_before_any_frame_is_made(options, error, message):
    Path("folder.mp4").mkdir()
    with pytest.raises(error, match=message):
        export_to_video(never(), **{"output_video_path": "x.mp4", **options})


def test_without_pyav_or_its_encoder_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    with pytest.raises(RuntimeError, match=r"libx264.*pip install .*av"):
        export_to_video(never(), "x.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        export_to_video(never(), "x.mp4")
