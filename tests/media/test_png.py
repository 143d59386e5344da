"""PNG files written in bands: any reader sees the same pixels, and a file is there whole or not at all."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowtide.media.png import PictureFile, PngWriter, fresh_path, numbered_paths


def picture(height, width, seed=0, kind="noise"):
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "smooth":
        y, x = np.mgrid[:height, :width]
        return np.stack([y % 256, x % 256, (x + y) // 2 % 256], axis=2).astype(np.uint8)
    return numbers if kind == "noise" else np.full_like(numbers, 77)


def write(file, content, bands):
    with PngWriter(file, content.shape[1], content.shape[0]) as png:
        first = 0
        for band in bands:
            png.write(content[first : first + band])
            first += band
    return file.path


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 40),
    st.sampled_from(["noise", "smooth", "flat"]),
)
def test_any_bands_give_the_pixels_back(bands, width, kind):
    content = picture(sum(bands), width, sum(bands), kind)
    path = write(PictureFile(Path(os.environ["PYTEST_PNG_FOLDER"]) / "x.png"), content, bands)
    with Image.open(path) as found:
        found.load()
        assert (found.mode, found.size) == ("RGB", (width, sum(bands)))
        assert np.array_equal(np.asarray(found), content)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_PNG_FOLDER", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_bands_change_no_byte_of_what_is_compressed_and_filters_help():
    content = picture(64, 200, kind="smooth")
    whole, banded = (
        write(PictureFile(Path(name)), content, bands) for name, bands in (("a.png", [64]), ("b.png", [7, 57]))
    )
    assert whole.read_bytes() == banded.read_bytes()
    assert whole.stat().st_size < len(zlib.compress(content.tobytes(), 6)) / 3


def test_every_filter_is_right():
    """Each of the five is chosen somewhere in this picture, and PIL undoes each."""
    from lowtide.media.png import _filtered

    y, x = np.mgrid[:40, :64]
    ramp = (5 * x % 256).astype(np.uint8)
    parts = [picture(8, 64), np.repeat(ramp[:8, :, None], 3, 2), np.repeat(picture(1, 64, 3), 8, 0)]
    wave = (60 + 50 * np.sin(x / 3) + 50 * np.cos(y / 3)).astype(np.uint8)
    content = np.concatenate([*parts, np.repeat(wave[:, :, None], 3, 2)])
    chosen = {int(row[0]) for row in _filtered(content.reshape(len(content), -1), None)}
    assert len(chosen) >= 4
    with Image.open(write(PictureFile(Path("x.png")), content, [1, 20, len(content) - 21])) as found:
        assert np.array_equal(np.asarray(found), content)


def test_texts_of_any_script():
    texts = {"prompt": "деревянная лодка ⛵ 静かな海", "seed": "7", "place": "Überlingen"}
    with Image.open(write(PictureFile(Path("x.png"), texts), picture(2, 2), [2])) as found:
        assert found.text == texts


def test_the_old_picture_stays_until_the_new_one_is_whole():
    file = PictureFile(Path("x.png"))
    write(file, picture(4, 4, 1), [4])
    before = file.path.read_bytes()

    def interrupted(error):
        with PngWriter(file, 4, 4) as png:
            png.write(picture(2, 4))
            assert len(os.listdir()) == 2
            raise error

    for error in (KeyboardInterrupt(), OSError(28, "full")):
        with pytest.raises(type(error)):
            interrupted(error)
    with pytest.raises(AssertionError, match="2 rows were written of 4"), PngWriter(file, 4, 4) as png:
        png.write(picture(2, 4))
    assert os.listdir() == ["x.png"]
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("text", [{"ключ": "x"}, {"": "x"}, {"a" * 80: "x"}, {" a": "x"}, {"a": "x\0y"}])
def test_keywords_that_a_png_cannot_have(text):
    with pytest.raises(ValueError, match="no keyword for a PNG"):
        PictureFile(Path("x.png"), text)


def test_a_disk_that_is_full_when_the_file_is_closed(monkeypatch):
    """The last bytes leave Python's buffer when the file is closed."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def close(self):
            self.file.close()
            raise OSError(28, "No space left on device")

    png = PngWriter(PictureFile(Path("x.png")), 2, 2)
    png.__enter__()
    png._out = Full(png._out)
    png.write(picture(2, 2))
    with pytest.raises(OSError, match="No space"):
        png.__exit__(None, None, None)
    assert os.listdir() == []


def test_two_writers_of_one_name_do_not_disturb_each_other():
    first, second = picture(3, 3, 1), picture(3, 3, 2)
    with PngWriter(PictureFile(Path("x.png")), 3, 3) as one:
        with PngWriter(PictureFile(Path("x.png")), 3, 3) as other:
            other.write(second)
        one.write(first)
    with Image.open("x.png") as found:
        assert np.array_equal(np.asarray(found), first)


def test_begun_anew():
    with PngWriter(PictureFile(Path("x.png"), {"a": "b"}), 3, 5) as png:
        png.write(picture(4, 3))
        png.restart()
        png.write(picture(5, 3, 2))
    with Image.open("x.png") as found:
        assert np.array_equal(np.asarray(found), picture(5, 3, 2))
        assert found.text == {"a": "b"}


def test_names():
    with pytest.raises(ValueError, match=r"ends in \.png"):
        PictureFile(Path("x.jpg"))
    assert numbered_paths(Path("a.png"), 1) == [Path("a.png")]
    assert numbered_paths(Path("a.png"), 2) == [Path("a-1.png"), Path("a-2.png")]
    Path("a.png").touch()
    assert fresh_path(Path("a.png")) == Path("a-2.png")
