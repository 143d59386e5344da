"""Where the bytes of weights rest: in a file, in host memory, on the device. Each of them is a flat row of bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from lowtide.memory.bounds import STAGE_BYTES
from lowtide.memory.rule import Tier
from lowtide.ops.modes import outside_inference_mode
from lowtide.sizes import format_decimal
from lowtide.weights.files import CHUNK_BYTES, InFile, Mapping, Origin, SpillFile, WeightFile, read
from lowtide.weights.layout import is_reordered
from lowtide.weights.page_map import bring_in, let_go


class Rest(Protocol):
    """The resting bytes of one weight, `nbytes` of them."""

    tier: Tier
    works_in_place: bool
    """Whether a CPU can compute with the bytes where they are."""

    def on_host(self) -> torch.Tensor:
        """The bytes in host memory, flat uint8; of a file, a view that brings them in as they are touched."""
        ...

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        ...


def copy_in_pieces(rest: Rest, target: torch.Tensor) -> None:
    """Fill flat bytes of a device without streams. A file is read, not mapped, since the pages would stay."""
    piece = torch.empty(min(STAGE_BYTES, target.numel()), dtype=torch.uint8)
    for start in range(0, target.numel(), STAGE_BYTES):
        part = target[start : start + STAGE_BYTES]
        rest.copy_into(piece[: part.numel()], start)
        part.copy_(piece[: part.numel()])


class HostRest:
    """Bytes in host memory. `origin` is the place in a file where their numbers come from, if they do."""

    tier = Tier.HOST
    works_in_place = True

    def __init__(self, flat: torch.Tensor, origin: Origin | None = None) -> None:
        self.flat = flat
        self.origin = origin

    def on_host(self) -> torch.Tensor:
        """The bytes themselves."""
        return self.flat

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        target.copy_(self.flat[start : start + target.numel()])


class DeviceRest:
    """Bytes on the device, where they stay; they carry their numbers' place in a file as `HostRest` does."""

    tier = Tier.DEVICE
    works_in_place = False

    def __init__(self, flat: torch.Tensor, origin: Origin | None = None) -> None:
        self.flat = flat
        self.origin = origin

    def on_host(self) -> torch.Tensor:
        """The bytes, copied to the host if the device is another."""
        return self.flat.cpu()

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        target.copy_(self.flat[start : start + target.numel()])


class DiskRest:
    """Bytes in a file. Numbers of another dtype, or in another order, are converted whenever they are read.

    `layout` is the shape and the strides that the numbers have where they work, None for the file's own order.
    Numbers that are as wide as another dtype left them were rounded `through` that one.
    """

    tier = Tier.DISK

    def __init__(
        self,
        origin: Origin,
        dtype: torch.dtype,
        layout: tuple[Sequence[int], Sequence[int]] | None = None,
        through: torch.dtype | None = None,
    ) -> None:
        self.origin = origin
        self.dtype = dtype
        self.layout = layout if layout is not None and is_reordered(*layout) else None
        self.through = through
        self.works_in_place = self.lying.works_as(dtype, *(self.layout or ()))
        self._window: Mapping | None = None

    @property
    def lying(self) -> InFile:
        """How the numbers lie in the file: what was rounded on its way cannot work there."""
        return self.origin.lying if self.through is None else replace(self.origin.lying, in_place=False)

    def on_host(self) -> torch.Tensor:
        """The bytes for somebody to keep: a private view of the file, or a copy where it must be converted."""
        if self.works_in_place:
            return _flat(self.origin.file.mapping(), self.origin)
        flat = torch.empty(self._count * self.dtype.itemsize, dtype=torch.uint8)
        self.copy_into(flat)
        return flat

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on, counted as they work."""
        first, numbers = start // self.dtype.itemsize, target.view(self.dtype)
        if self.layout is None:
            self._read(numbers, first)
        else:
            self._read_reordered(numbers, first, *self.layout)

    @property
    def _count(self) -> int:
        return self.origin.nbytes // self.origin.dtype.itemsize

    def _read(self, numbers: torch.Tensor, first: int) -> None:
        offset, size = self.origin.offset, self.origin.dtype.itemsize
        if self.through is None:
            read(replace(self.origin, offset=offset + first * size, nbytes=numbers.numel() * size), numbers)
            return
        for part in numbers.split(CHUNK_BYTES // size):
            rounded = torch.empty(part.numel(), dtype=self.through)
            read(replace(self.origin, offset=offset + first * size, nbytes=part.numel() * size), rounded)
            part.copy_(rounded)
            first += part.numel()

    def _read_reordered(self, numbers: torch.Tensor, first: int, shape: Sequence[int], stride: Sequence[int]) -> None:
        """Read row by row of the first dimension, which is the outermost one in either order."""
        row, end = self._count // shape[0], first + numbers.numel()
        step = max(1, CHUNK_BYTES // (row * self.dtype.itemsize))
        for top in range(first // row, -(-end // row), step):
            count = min(step, shape[0] - top)
            in_file = torch.empty((count, *shape[1:]), dtype=self.dtype)
            self._read(in_file.view(-1), top * row)
            at_work = torch.empty_strided(in_file.shape, (row, *stride[1:]), dtype=self.dtype).copy_(in_file)
            run = at_work.as_strided((count * row,), (1,))
            begin, stop = max(first, top * row), min(end, (top + count) * row)
            numbers[begin - first : stop - first].copy_(run[begin - top * row : stop - top * row])

    def window(self) -> torch.Tensor:
        """The bytes as a view of a mapping that only the engine uses, flat uint8; ones that work in place only."""
        if self._window is None:
            self._window = self.origin.file.mapping("window")
        return _flat(self._window, self.origin)


class Window:
    """Parts of mapped files that are brought in and let go together; neighbours are one part."""

    def __init__(self, rests: Iterable[DiskRest]) -> None:
        self._files: list[WeightFile] = []
        self._parts: list[tuple[int, int]] = []
        for rest in sorted(rests, key=lambda resting: resting.window().data_ptr()):
            address, nbytes = rest.window().data_ptr(), rest.origin.nbytes
            if rest.origin.file not in self._files:
                self._files.append(rest.origin.file)
            if self._parts and sum(self._parts[-1]) == address:
                self._parts[-1] = (self._parts[-1][0], self._parts[-1][1] + nbytes)
            else:
                self._parts.append((address, nbytes))

    def bring_in(self) -> None:
        """Read the pages from the disk now; raises `CheckpointError` if a file is not what it was."""
        for file in self._files:
            file.check()
        try:
            for address, nbytes in self._parts:
                bring_in(address, nbytes)
        except OSError as error:
            for file in self._files:
                file.check()
            raise OSError(error.errno, f"{self._files[0].path}: {error.strerror}") from error

    def let_go(self, *, edges: bool = False) -> None:
        """Drop the pages from this process; with `edges` also those that are shared with other parts."""
        for address, nbytes in self._parts:
            let_go(address, nbytes, edges=edges)


class Spill:
    """An unnamed file for what has no file and may not stay in host memory; made when first needed."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder or tempfile.gettempdir())
        self._file: SpillFile | None = None

    def write(self, flat: torch.Tensor) -> DiskRest:
        """Move flat host bytes to the file; raises `OSError`, naming the folder, if they do not fit there."""
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = SpillFile(self._folder)
            return DiskRest(self._file.append(flat), torch.uint8)
        except OSError as error:
            free = format_decimal(shutil.disk_usage(self._folder).free) if self._folder.is_dir() else "unknown"
            raise OSError(
                error.errno,
                f"{format_decimal(flat.numel())} of weights cannot be written to {self._folder} ({error.strerror}; "
                f"free: {free}). Choose another folder (offload_to_disk_path or spill_folder), or rest='host'.",
            ) from error


def _flat(mapping: Mapping, origin: Origin) -> torch.Tensor:
    with outside_inference_mode():
        return torch.frombuffer(mapping, dtype=torch.uint8, count=origin.nbytes, offset=origin.offset)
