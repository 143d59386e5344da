"""Storage for rows in pages of equal size: in a device's memory, in host memory, or in a file without a name.

A page that its rows have left is taken by the next rows, so stored rows have no gaps between them.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from lowtide.activations.graph import Span
from lowtide.ops.meta_device import meant_type
from lowtide.weights.files import SpillFile

PAGES_IN_BLOCK = 40
"""Pages of a block on a CPU, where memory that was never written to costs nothing; elsewhere a block is one page."""


def pages_in_block(device_type: str) -> int:
    """How many pages are allocated at once, as one block."""
    return PAGES_IN_BLOCK if device_type == "cpu" else 1


class Pages(Protocol):
    """Numbered pages of `page_bytes` bytes; `peak_bytes` is the most in use at once since `count_anew` was called."""

    page_bytes: int
    peak_bytes: int

    @property
    def state(self) -> tuple[int, int]:
        """How many pages there are, and how many of them are free."""
        ...

    def count_anew(self) -> None:
        """Set the peak to the bytes that are in use now."""
        ...

    def take(self) -> int:
        """Take a free page and return its number."""
        ...

    def give(self, page: int) -> None:
        """Give a page back."""
        ...

    def write(self, page: int, start: int, content: torch.Tensor) -> None:
        """Write flat uint8 bytes into a page from `start` on."""
        ...

    def read(self, page: int, start: int, target: torch.Tensor) -> None:
        """Fill a flat uint8 tensor with the bytes of a page from `start` on."""
        ...


class PageNumbers:
    """Hands out the lowest free page number, and counts the bytes in use."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.peak_bytes = 0
        self._free: list[int] = []
        self._count = 0

    @property
    def state(self) -> tuple[int, int]:
        """How many pages there are, and how many of them are free."""
        return self._count, len(self._free)

    def take(self) -> int:
        """Take the lowest free page and return its number."""
        page = heapq.heappop(self._free) if self._free else self._count
        self._count = max(self._count, page + 1)
        self.peak_bytes = max(self.peak_bytes, self._used())
        return page

    def count_anew(self) -> None:
        """Set the peak to the bytes that are in use now."""
        self.peak_bytes = self._used()

    def _used(self) -> int:
        return (self._count - len(self._free)) * self.page_bytes

    def give(self, page: int) -> None:
        """Give a page back."""
        heapq.heappush(self._free, page)


class MemoryPages(PageNumbers):
    """Pages in the memory of a device, allocated when first needed and kept until the end.

    On a CPU many pages are allocated at once, as one block. Malloc puts blocks of that size outside its heap; single
    pages would lie between bands, and the heap would be full of holes when the bands are freed.
    """

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        super().__init__(page_bytes)
        self._device = device
        self._in_block = pages_in_block(meant_type(device))
        self._blocks: list[torch.Tensor] = []

    def take(self) -> int:
        """Take the lowest free page, with memory for it, and return its number."""
        page = super().take()
        while len(self._blocks) * self._in_block <= page:
            shape = (self._in_block, self.page_bytes)
            self._blocks.append(torch.empty(shape, dtype=torch.uint8, device=self._device))
        return page

    def write(self, page: int, start: int, content: torch.Tensor) -> None:
        """Write flat uint8 bytes into a page from `start` on."""
        self._page(page)[start : start + content.numel()].copy_(content)

    def read(self, page: int, start: int, target: torch.Tensor) -> None:
        """Fill a flat uint8 tensor with the bytes of a page from `start` on."""
        target.copy_(self._page(page)[start : start + target.numel()])

    def _page(self, page: int) -> torch.Tensor:
        return self._blocks[page // self._in_block][page % self._in_block]


class NoPages(PageNumbers):
    """Pages that are counted but hold nothing: for rows on meta that a run would store on the host or the disk."""

    def write(self, page: int, start: int, content: torch.Tensor) -> None:
        """Do nothing."""

    def read(self, page: int, start: int, target: torch.Tensor) -> None:
        """Do nothing."""


class FilePages(PageNumbers):
    """Pages in a file without a name, so that no file is left behind; raises `OSError` if it cannot be written."""

    def __init__(self, page_bytes: int, folder: str | os.PathLike[str] | None) -> None:
        super().__init__(page_bytes)
        self._folder = Path(folder or tempfile.gettempdir())
        self._file = SpillFile(self._folder)

    def write(self, page: int, start: int, content: torch.Tensor) -> None:
        """Write flat uint8 bytes into a page from `start` on."""
        try:
            self._file.put(content.cpu(), page * self.page_bytes + start)
        except OSError as error:
            reason = f"{error.strerror}. Choose another folder, a smaller picture, or half precision."
            raise OSError(error.errno, f"Rows cannot be written to {self._folder}: {reason}") from error

    def read(self, page: int, start: int, target: torch.Tensor) -> None:
        """Fill a flat uint8 tensor with the bytes of a page from `start` on."""
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        self._file.get(host, page * self.page_bytes + start)
        if host is not target:
            target.copy_(host)


class RowStore:
    """The rows of one value, in pages; its first rows may leave before its last rows are written.

    A value of several `planes`, such as the frames of a clip, has separate pages for each plane; flat tensors hold the
    rows of one plane after those of another. `row_bytes` are the bytes of one row of all planes together.
    """

    def __init__(self, pages: Pages, row_bytes: int, planes: int = 1) -> None:
        self._planes = [_Plane(pages, row_bytes // planes) for _ in range(planes)]

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Store rows from `first` on, given as flat uint8; rows on meta only take their pages."""
        if rows.is_meta:
            self.reserve(first, rows.numel())
            return
        for plane, part in zip(self._planes, rows.view(len(self._planes), -1), strict=True):
            plane.write(first, part)

    def reserve(self, first: int, nbytes: int) -> None:
        """Take the pages for `nbytes` bytes of rows from `first` on."""
        for plane in self._planes:
            plane.reserve(first, nbytes // len(self._planes))

    def read(self, span: Span, target: torch.Tensor) -> None:
        """Fill a flat uint8 tensor with the rows of `span`, unless it is on meta."""
        if target.is_meta:
            return
        for plane, part in zip(self._planes, target.view(len(self._planes), -1), strict=True):
            plane.read(span, part)

    def release(self, before: int) -> None:
        """Give back the pages that hold only rows before row `before`."""
        for plane in self._planes:
            plane.release(before)

    def close(self) -> None:
        """Give back all pages."""
        for plane in self._planes:
            plane.close()


class _Plane:
    """The rows of one plane, one after the other in pages."""

    def __init__(self, pages: Pages, row_bytes: int) -> None:
        self._pages = pages
        self._row_bytes = row_bytes
        self._places: dict[int, int] = {}
        self._kept_from = 0

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Store rows from `first` on, given as flat uint8."""
        self.reserve(first, rows.numel())
        done = 0
        for place, start, count in self._pieces(first * self._row_bytes, rows.numel()):
            self._pages.write(self._places[place], start, rows[done : done + count])
            done += count

    def reserve(self, first: int, nbytes: int) -> None:
        """Take the pages for `nbytes` bytes of rows from `first` on."""
        for place, _, _ in self._pieces(first * self._row_bytes, nbytes):
            if place not in self._places:
                self._places[place] = self._pages.take()

    def read(self, span: Span, target: torch.Tensor) -> None:
        """Fill a flat uint8 tensor with the rows of `span`."""
        done = 0
        for place, start, count in self._pieces(span[0] * self._row_bytes, target.numel()):
            self._pages.read(self._places[place], start, target[done : done + count])
            done += count

    def release(self, before: int) -> None:
        """Give back the pages that hold only rows before row `before`."""
        until = before * self._row_bytes // self._pages.page_bytes
        for place in range(self._kept_from, until):
            self._pages.give(self._places.pop(place))
        self._kept_from = max(self._kept_from, until)

    def close(self) -> None:
        """Give back all pages."""
        for page in self._places.values():
            self._pages.give(page)
        self._places.clear()

    def _pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """The pages that a range of bytes lies in: place of the page, start in the page, bytes in the page."""
        end = offset + nbytes
        while offset < end:
            place, start = divmod(offset, self._pages.page_bytes)
            count = min(self._pages.page_bytes - start, end - offset)
            yield place, start, count
            offset += count
