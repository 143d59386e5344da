"""Pages: what is written is read, in any order and size, and no more pages are used than rows need."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowtide.activations.pages import PAGES_IN_BLOCK, FilePages, MemoryPages, RowStore


def numbers(count, seed=0):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("on_disk", [False, True])
@given(page=st.integers(1, 50), row=st.integers(1, 60), bands=st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_rows_are_kept_until_they_are_released(on_disk, page, row, bands):
    pages = FilePages(page, None) if on_disk else MemoryPages(page, torch.device("cpu"))
    store, content, rows = RowStore(pages, row), numbers(sum(bands) * row), sum(bands)
    first = 0
    for band in bands:
        store.write(first, content[first * row : (first + band) * row])
        first += band
    for start in range(rows):
        store.release(start)
        target = torch.empty((rows - start) * row, dtype=torch.uint8)
        store.read((start, rows), target)
        assert torch.equal(target, content[start * row :])
    assert pages.peak_bytes <= rows * row + page
    store.close()
    other = RowStore(pages, row)
    other.write(0, content)
    assert pages.peak_bytes <= rows * row + page, "pages that were given back are taken again"


def test_pages_move_along_with_rows():
    """Written below as they are released above: never more than the rows in between."""
    pages = MemoryPages(64, torch.device("cpu"))
    store = RowStore(pages, 16)
    for row in range(400):
        store.write(row, numbers(16, row))
        store.release(row - 8)
    assert pages.peak_bytes <= 10 * 16 + 2 * 64
    target = torch.empty(16, dtype=torch.uint8)
    store.read((399, 400), target)
    assert torch.equal(target, numbers(16, 399))
    with pytest.raises(KeyError):
        store.read((0, 1), target)


def test_a_released_row_may_lose_its_bytes():
    """A control: without a page of its own, a row would be another's."""
    pages = MemoryPages(16, torch.device("cpu"))
    store = RowStore(pages, 16)
    store.write(0, numbers(16, 1))
    store.release(1)
    store.write(1, numbers(16, 2))
    assert pages.peak_bytes == 16


def test_memory_is_taken_in_blocks():
    pages = MemoryPages(8, torch.device("cpu"))
    for place in range(PAGES_IN_BLOCK + 1):
        pages.write(pages.take(), 0, numbers(8, place))
    target = torch.empty(8, dtype=torch.uint8)
    pages.read(PAGES_IN_BLOCK, 0, target)
    assert torch.equal(target, numbers(8, PAGES_IN_BLOCK))


def test_a_full_disk_names_the_folder(monkeypatch, tmp_path):
    pages = FilePages(8, str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowtide.weights.files._write_at", full)
    with pytest.raises(OSError, match="No space left") as caught:
        pages.write(pages.take(), 0, numbers(8))
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []
