"""Pictures straight into files: the pixels of the other outputs, names, the safety checker, faults."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.fitting import fits

from lowtide.media.png import PictureFile
from lowtide.pipelines.picture_files import THUMBNAIL_SIDE, _Thumbnail

CALL = {"prompt": "sea", "num_inference_steps": 2, "height": 24, "width": 40}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipe(tmp_path_factory):
    return fits.small(tmp_path_factory.mktemp("parts"))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).copy()


def draw(pipe, **options):
    return pipe(**{**CALL, **options}, generator=tiny.seeded(3))


@pytest.mark.parametrize("mode", [None, "blended", "exact"])
def test_the_file_has_the_pixels_of_the_picture(pipe, mode):
    if mode is not None:
        pipe.enable_vae_tiling(mode, **({"tile_size": 16} if mode == "blended" else {"work": 5_000}))
    expected = np.asarray(draw(pipe).images[0])
    result = draw(pipe, output_type="file", output_path="x.png")
    assert result.images == [Path("x.png")]
    assert result.nsfw_content_detected is None
    assert np.array_equal(pixels("x.png"), expected)


def test_names_of_several_pictures(pipe):
    call = {"prompt": ["sea", "night"], "output_type": "file"}
    assert draw(pipe, **call, output_path="sub/x.png").images == [Path("sub/x-1.png"), Path("sub/x-2.png")]
    given = ["a.png", PictureFile(Path("b.png"), {"note": "mine"})]
    assert draw(pipe, **call, output_path=given).images == [Path("a.png"), Path("b.png")]
    with Image.open("b.png") as second:
        assert second.text == {"note": "mine"}
    assert np.array_equal(pixels("a.png"), pixels("sub/x-1.png"))
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_without_a_name_nothing_is_replaced(pipe):
    names = [draw(pipe, output_type="file").images[0].name for _ in range(3)]
    assert names == ["picture.png", "picture-2.png", "picture-3.png"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"output_path": "x.png"}, "output_path is for output_type='file'"),
        ({"output_type": "file", "output_path": "x.jpg"}, "ends in .png"),
        ({"output_type": "file", "output_path": ["a.png", "b.png"]}, "2 output paths for 1 pictures"),
        ({"output_type": "file", "prompt": ["a", "b"], "output_path": ["a.png", "a.png"]}, "one output path"),
        ({"output_type": "tiff"}, "file"),
        ({"output_type": "file", "output_path": 5}, "output_path=5 is not possible"),
        ({"output_type": "file", "output_path": b"x.png"}, "output_path=b'x.png' is not possible"),
        ({"output_type": "file", "output_path": "nul\0.png"}, "cannot be the name"),
    ],
)
def test_what_is_not_possible_is_told_before_any_work(pipe, options, told, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=told):
        draw(pipe, **options)
    assert os.listdir() == []


def test_a_place_that_cannot_be_written(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: 1 / 0)
    Path("file").touch()
    with pytest.raises(OSError, match=r"Nothing can be written in file: .* another output_path"):
        draw(pipe, output_type="file", output_path="file/x.png")
    Path("folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        draw(pipe, output_type="file", output_path="folder.png")
    with pytest.raises(OSError, match=r"Nothing can be written in /proc"):
        draw(pipe, output_type="file", output_path="/proc/x.png")


def test_a_link_stays_one(pipe):
    Path("sub").mkdir()
    Path("sub/x.png").touch()
    Path("x.png").symlink_to("sub/x.png")
    draw(pipe, output_type="file", output_path="x.png")
    assert Path("x.png").is_symlink()
    assert pixels("sub/x.png").shape == (24, 40, 3)
    assert sorted(os.listdir("sub")) == ["x.png"]


@pytest.mark.parametrize("output_type", ["pil", "file"])
def test_a_decode_that_cannot_be_is_told_before_any_step(pipe, output_type, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: 1 / 0)
    pipe.enable_vae_tiling("exact", budget=100)
    with pytest.raises(ValueError, match=r"budget=0\.1 kB is too small"):
        draw(pipe, output_type=output_type)
    pipe.enable_vae_tiling("exact", rows="disk")
    monkeypatch.setattr("lowtide.activations.row_settings.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="do not fit in"):
        draw(pipe, output_type=output_type)
    with pytest.raises(ZeroDivisionError):
        draw(pipe, output_type="latent")


def test_a_failed_decode_leaves_the_old_file(pipe, monkeypatch):
    pipe.enable_vae_tiling("exact", work=5_000)
    draw(pipe, output_type="file", output_path="x.png")
    before = pixels("x.png")
    write = pipe.vae.decode_rows

    def stopping(z, sink):
        def stop(first, rows):
            if first > 4:
                raise KeyboardInterrupt
            sink(first, rows)

        write(z, stop)

    monkeypatch.setattr(pipe.vae, "decode_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, output_type="file", output_path="x.png", prompt="night")
    assert os.listdir() == ["x.png"]
    assert np.array_equal(pixels("x.png"), before)
    assert pipe.stages.observers == []


@pytest.mark.filterwarnings("ignore:The safety checker blackened")
@pytest.mark.parametrize("mode", [None, "exact"])
def test_the_safety_checker_blackens_files_too(tmp_path_factory, mode):
    pipe = fits.small(tmp_path_factory.mktemp("parts"), checker=True)
    pipe.safety_checker = tiny.safety_checker(0.5)
    if mode is not None:
        pipe.enable_vae_tiling(mode, work=5_000)
    call = {"prompt": ["sea", "night", "boat", "red"]}
    expected = draw(pipe, **call)
    result = draw(pipe, **call, output_type="file")
    assert result.nsfw_content_detected == expected.nsfw_content_detected
    assert len(set(result.nsfw_content_detected)) == 2, "a control: some are and some are not"
    for path, picture in zip(result.images, expected.images, strict=True):
        assert np.abs(pixels(path).astype(int) - np.asarray(picture)).max() <= 1


def test_a_thumbnail_is_the_mean_of_squares():
    side = 2 * THUMBNAIL_SIDE
    picture = np.random.default_rng(0).random((side + 3, side, 3), dtype=np.float32)
    small = _Thumbnail(side, side + 3)
    for first in range(0, side + 3, 7):
        small.add(first, picture[first : first + 7])
    found = small.picture()
    assert found.shape == (1, 3, THUMBNAIL_SIDE + 2, THUMBNAIL_SIDE)
    assert np.allclose(found[0, :, 0, 0], picture[:2, :2].mean((0, 1)), atol=1e-6)
    assert np.allclose(found[0, :, -1, -1], picture[-1:, -2:].mean((0, 1)), atol=1e-6)


def test_progress_in_percent(pipe):
    class Watch:
        def __init__(self):
            self.started, self.steps = {}, []

        def stage_started(self, name, steps):
            self.started[name] = steps

        def step_done(self, name, step):
            if name == "decode":
                self.steps.append(step)

        def stage_finished(self, name):
            pass

    for options in ({}, {"output_type": "file"}):
        watch = Watch()
        pipe.enable_vae_tiling("exact", work=5_000)
        with pipe.stages.observed(watch):
            draw(pipe, prompt=["sea", "night"], **options)
        assert watch.started["decode"] == 100
        assert watch.steps == list(range(1, 101))
    pipe.disable_vae_tiling()
    watch = Watch()
    with pipe.stages.observed(watch):
        draw(pipe)
    assert watch.started["decode"] is None


def test_slices_and_tiles_reach_the_autoencoder(pipe):
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling(tile_size=16, overlap=0.5)
    assert pipe.vae.use_slicing
    assert pipe.vae.tiles.width == 16
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_slicing
    assert pipe.vae.tiles is None
    assert torch.is_grad_enabled()
