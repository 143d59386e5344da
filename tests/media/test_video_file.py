"""Sheets of frames: which are shown, where, how large."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowtide.media.video_file import contact_sheet, spread_numbers

BACKGROUND = (22, 23, 26)
MARGIN, GAP, CAPTION = 28, 20, 30


def clip(count, height=48, width=64):
    """Plain frames; each has its number as its level of red."""
    frames = np.full((count, height, width, 3), 200, dtype=np.uint8)
    frames[..., 0] = np.arange(count)[:, None, None]
    return frames


def shown(sheet, cell_width, cell_height):
    """The numbers of the frames on a sheet, row by row."""
    rows, columns = (
        (full - 2 * MARGIN + GAP) // step
        for full, step in zip(sheet.size[::-1], (cell_height + CAPTION + GAP, cell_width + GAP), strict=True)
    )
    middles = [
        (
            MARGIN + column * (cell_width + GAP) + cell_width // 2,
            MARGIN + row * (cell_height + CAPTION + GAP) + cell_height // 2,
        )
        for row in range(rows)
        for column in range(columns)
    ]
    pixels = [sheet.getpixel(middle) for middle in middles]
    return rows, columns, [pixel[0] for pixel in pixels if pixel != BACKGROUND]


@given(st.integers(1, 200), st.integers(1, 30))
def test_numbers_are_spread_from_the_first_to_the_last(total, count):
    numbers = spread_numbers(total, count)
    assert len(numbers) == min(total, count)
    assert numbers[0] == 0
    if len(numbers) > 1:
        assert numbers[-1] == total - 1
        steps = np.diff(numbers)
        assert steps.max() - steps.min() <= 1


def test_twelve_frames_of_49():
    sheet = contact_sheet(clip(49), cell=128)
    rows, columns, numbers = shown(sheet, 128, 96)
    assert (sheet.mode, rows, columns) == ("RGB", 3, 4)
    assert sheet.size == (4 * 128 + 3 * GAP + 2 * MARGIN, 3 * (96 + CAPTION) + 2 * GAP + 2 * MARGIN)
    assert numbers == spread_numbers(49, 12)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 11, 12])
def test_few_frames_are_all_shown(count):
    assert shown(contact_sheet(clip(count), cell=128), 128, 96)[2] == list(range(count))


def test_one_frame_makes_a_sheet_of_one_cell():
    assert contact_sheet(clip(1), cell=128, columns=5).size == (128 + 2 * MARGIN, 96 + CAPTION + 2 * MARGIN)


def test_columns_and_count_as_asked():
    rows, columns, numbers = shown(contact_sheet(clip(20), 3, count=7, cell=128), 128, 96)
    assert (rows, columns, len(numbers)) == (3, 3, 7)


@pytest.mark.parametrize("size", [(480, 720), (720, 480), (17, 31), (8, 400)])
def test_frames_keep_their_shape(size):
    height, width = size
    sheet = np.asarray(contact_sheet(clip(1, *size), cell=300))
    rows, columns = np.nonzero((sheet == (0, 200, 200)).all(axis=2))
    found = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(found) == 300
    assert found[0] / found[1] == pytest.approx(height / width, rel=0.1)


def caption(sheet):
    """Where one cell's caption has ink, by columns."""
    band = np.asarray(sheet)[-MARGIN - CAPTION : -MARGIN, MARGIN:-MARGIN]
    return (band != BACKGROUND).any(axis=(0, 2))


def test_captions_have_the_number_and_the_time_where_there_is_one():
    plain, timed = (contact_sheet(clip(1), cell=256, fps=fps) for fps in (None, 8))
    assert caption(plain)[:60].any()
    assert not caption(plain)[-60:].any()
    assert caption(timed)[-60:].any()
    early, late = (contact_sheet(clip(9), cell=256, columns=1, count=2, fps=fps) for fps in (8, 4))
    assert not np.array_equal(caption(early), caption(late))


def test_every_kind_of_frames_gives_the_same_sheet():
    frames = clip(20)
    expected = contact_sheet(frames).tobytes()
    for other in (
        list(frames),
        iter(frames),
        [Image.fromarray(frame) for frame in frames],
        torch.from_numpy(frames),
        frames / 255,
    ):
        assert contact_sheet(other).tobytes() == expected
    assert contact_sheet(frames[::-1]).tobytes() != expected  # negative control


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 0}, "columns=0 .* from 1"),
        ({"count": 0}, "count=0"),
        ({"cell": 5}, "cell=5 .* from 96"),
        ({"fps": 0}, "fps=0 .* above 0"),
        ({"frames": []}, "at least one frame"),
        ({"frames": [clip(1)[0], clip(1, 50)[0]]}, "Frame 1 is 64x50 pixels and the first 64x48"),
        ({"frames": clip(1)[0]}, "no video"),
        ({"frames": None}, "NoneType"),
    ],
)
def test_what_is_not_possible_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**{"frames": clip(3), **options})
