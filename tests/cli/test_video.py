"""`lowtide generate --video` with a tiny model of random weights: files that players open, sheets, clear errors."""

import pytest
from PIL import Image
from tests import tiny, tiny_video
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.cli.errors import InputError
from lowtide.cli.request import Video, video_from

av = pytest.importorskip("av")


def lowtide(*arguments):
    return CliRunner().invoke(app, ["generate", "sea", "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_video.write_checkpoint(tmp_path_factory.mktemp("tiny") / "video")


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, stream.codec_context.name, stream.average_rate


def test_a_video_and_a_sheet(model, tmp_path):
    out = tmp_path / "x.mp4"
    result = lowtide("--video", "--model", model, "--steps", 2, "--seed", 3, "--sheet", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(out), str(tmp_path / "x-sheet.png")]
    for stage in ("load", "encode prompt", "denoise", "decode", "write"):
        assert stage in result.stderr
    frames, codec, rate = read(out)
    assert (len(frames), frames[0].shape, codec, rate) == (9, (32, 48, 3), "h264", 8)
    with Image.open(tmp_path / "x-sheet.png") as sheet:
        assert sheet.width > 3 * 320


def test_frames_size_fps_scheduler_and_plan(model, tmp_path):
    result = lowtide(
        "--video", "--model", model, "--steps", 2, "--frames", 17, "--size", "64x32", "--fps", 12.5, "--count", 2,
        "--scheduler", "cogvideox-dpm", "--offload", "block", "--casting", "int8", "--decode", "exact", "--seed", 1,
        "--out", tmp_path / "videos",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for seed in (1, 2):
        frames, _, rate = read(tmp_path / "videos" / f"sea-{seed}.mp4")
        assert (len(frames), frames[0].shape, rate) == (17, (32, 64, 3), 12.5)
    assert not list(tmp_path.glob("**/*.png"))


def test_the_same_seed_gives_the_same_video_however_it_is_made(model, tmp_path):
    contents = []
    for name, more in (("a", ()), ("b", ("--offload", "leaf")), ("c", ("--seed", 9))):
        options = ("--video", "--model", model, "--steps", 2, "--seed", 3, "--out", tmp_path / f"{name}.mp4", *more)
        assert lowtide(*options).exit_code == 0
        contents.append((tmp_path / f"{name}.mp4").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_the_other_kind_of_model_is_told(model, tmp_path):
    result = lowtide("--model", model, "--out", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "makes videos: add --video" in result.stderr
    tiny.pipeline(tmp_path / "parts").save_pretrained(tmp_path / "pictures")
    result = lowtide("--video", "--model", tmp_path / "pictures", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert "makes pictures: leave out --video" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--video"], "no video model is shipped"),
        (["--sheet"], "--sheet is for videos: add --video"),
        (["--frames", "9"], "--frames is for videos: add --video"),
        (["--fps", "0"], "--fps is for videos"),
        (["--video", "--model", "m", "--fps", "0"], "--fps 0: give frames a second from 0.1 to 240"),
        (["--video", "--model", "m", "--fps", "nan"], "--fps nan: give frames a second"),
        (["--video", "--model", "m", "--frames", "0"], "--frames 0: at least one frame"),
        (["--video", "--model", "m", "--out", "x.png"], "videos are written as MP4"),
        (["--out", "x.mp4"], "pictures are written as PNG"),
    ],
)
def test_what_is_not_possible(options, told):
    result = lowtide(*options)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_size_that_the_model_cannot_make(model, tmp_path):
    result = lowtide("--video", "--model", model, "--size", "40x30", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert "multiples of 16. The nearest is 32x32" in result.stderr
    assert not list(tmp_path.iterdir())


def test_defaults():
    assert video_from(True, None, None, False) == Video(None, 8.0, False)
    assert video_from(False, None, None, False) is None
    with pytest.raises(InputError):
        video_from(False, 0, None, False)


def test_a_sheet_takes_nobodys_place(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea-3-sheet.png").write_text("mine")
    result = lowtide("--video", "--model", model, "--steps", 1, "--seed", 3, "--sheet")
    assert result.stdout.split() == ["sea-3.mp4", "sea-3-sheet-2.png"]
    assert (tmp_path / "sea-3-sheet.png").read_text() == "mine"
    long = tmp_path / f"{'a' * 240}.mp4"
    result = lowtide("--video", "--model", model, "--steps", 1, "--sheet", "--out", long)
    assert result.exit_code == 2
    assert "too long" in result.stderr
    assert not long.exists()
