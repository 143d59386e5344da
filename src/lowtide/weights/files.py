"""Open files of weights: mapped windows, reads by position, and a check that a file is still what it was.

A file is opened once and kept open, so removing or replacing it under its name changes nothing for us. What was
written into it in place, or cut off, is seen by `WeightFile.check` before the next use and is an error: reading a
mapping behind the end of its file would kill the process.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowtide.forks import new_lock
from lowtide.weights.index import CheckpointError
from lowtide.weights.layout import is_reordered

CHUNK_BYTES = 2 * 2**20
"""Memory beyond the new tensors that a conversion takes."""

# Without this flag Linux refuses to map more than the RAM there is, although a private page costs nothing until it is
# written. Python names the flag from 3.13 on; the number is that of x86 and ARM.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_ALIGNMENT = 256


class WeightFile:
    """One file of weights, held open."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)) if descriptor is None else descriptor
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        self._mapped: dict[str, weakref.ref[Mapping]] = {}
        self._lock = new_lock()
        self.stamp = self._stamp()

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.stamp[0]

    def check(self) -> None:
        """Raise `CheckpointError` if the file was cut off or written to since it was opened."""
        now = self._stamp()
        if now != self.stamp:
            fault = "has become shorter" if now[0] < self.stamp[0] else "was written to"
            raise CheckpointError(f"{self.path}: the file {fault} since its header was read. Load the model again.")

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on; raises `CheckpointError` if there are not as many."""
        self.check()
        done = 0
        while done < len(target):
            count = _read_at(self._descriptor, target[done:], offset + done)
            if not count:
                raise CheckpointError(f"{self.path}: the file has become shorter since its header was read.")
            done += count

    def mapping(self, purpose: str = "tensors") -> Mapping:
        """A private, writable mapping of the whole file, one for each `purpose`: writes never reach the file."""
        with self._lock:
            mapped = self._mapped.get(purpose, _nothing)()
            if mapped is None or len(mapped) < self.size:
                mapped = self._map()
                self._mapped[purpose] = weakref.ref(mapped)
            return mapped

    def _map(self) -> Mapping:
        if sys.platform == "win32":
            mapped = Mapping(self._descriptor, 0, access=mmap.ACCESS_COPY)
        else:
            flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = Mapping(self._descriptor, 0, flags=flags, prot=protection)
        mapped.file = self
        _mappings.add(mapped)
        return mapped

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


def _nothing() -> None:
    return None


class SpillFile(WeightFile):
    """A file for what is in no checkpoint. It has no name, so it is gone with its last user."""

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix="lowtide-", buffering=0) as handle:
            super().__init__(folder / "(a file without a name)", os.dup(handle.fileno()))

    def append(self, flat: torch.Tensor) -> Origin:
        """Write the bytes of a flat host tensor; raises `OSError` if the disk is full."""
        offset = -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self.put(flat, offset)
        return Origin(self, offset, flat.numel() * flat.itemsize, flat.dtype)

    def put(self, flat: torch.Tensor, offset: int) -> None:
        """Write the bytes of a flat host tensor at `offset`; raises `OSError` if the disk is full."""
        content, done = _bytes(flat), 0
        while done < len(content):
            done += _write_at(self._descriptor, content[done:], offset + done)
        self.stamp = self._stamp()

    def get(self, flat: torch.Tensor, offset: int) -> None:
        """Fill a flat host tensor with the bytes from `offset` on."""
        self.read_into(_bytes(flat), offset)


class Mapping(mmap.mmap):
    """A mapped weight file. Tensors made of it keep it, and it keeps the file."""

    file: WeightFile

    @property
    def address(self) -> int:
        """Where in memory the file's first byte is."""
        return torch.frombuffer(self, dtype=torch.uint8, count=1).data_ptr()


@cache
def _products_mind_places() -> bool:
    """Whether float32 products sum in another order where a matrix does not begin at a multiple of 16 bytes.

    So does Intel MKL on an AMD EPYC, where one of the matrices is a single row; on Intel's processors it does not.
    Half of all safetensors files begin at such a place.
    """
    for size in (32, 100, 320):
        numbers = torch.linspace(-3, 3, size * size, device="cpu").sin()
        row, room = numbers[:size].view(1, size).clone(), torch.empty(size * size + 16, device="cpu")
        products = []
        for start in (0, 1, 2):
            matrix = room[start : start + size * size].view(size, size).copy_(numbers.view(size, size))
            products.append(torch.nn.functional.linear(row, matrix))
        if not all(torch.equal(product, products[0]) for product in products):
            return True
    return False


@dataclass(frozen=True)
class InFile:
    """How a weight lies in a file: its dtype there, and whether it may be computed with where it lies.

    `small` are its bytes where it rests in 8 bits or fewer, from which numbers are made around each call.
    """

    dtype: torch.dtype
    in_place: bool = True
    small: int | None = None

    @classmethod
    def at(cls, offset: int, dtype: torch.dtype) -> InFile:
        """That of numbers which begin at `offset`: in place only where they give the same result there."""
        is_wide = dtype.is_floating_point and dtype.itemsize >= 4
        return cls(dtype, offset % (16 if is_wide and _products_mind_places() else dtype.itemsize) == 0)

    def works_as(self, dtype: torch.dtype, shape: Sequence[int] = (), stride: Sequence[int] = ()) -> bool:
        """Whether the numbers can be computed with where they lie, as `dtype` and in the order of these strides."""
        return self.in_place and self.dtype == dtype and not is_reordered(shape, stride)


@dataclass(frozen=True)
class Origin:
    """Where a tensor's bytes lie: `nbytes` from `offset` in `file`, as numbers of type `dtype`."""

    file: WeightFile
    offset: int
    nbytes: int
    dtype: torch.dtype

    @property
    def lying(self) -> InFile:
        """How they lie there."""
        return InFile.at(self.offset, self.dtype)


class _Mappings:
    """The living mappings by address, for all threads."""

    def __init__(self) -> None:
        self._by_address: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()
        self._lock = new_lock()

    def add(self, mapping: Mapping) -> None:
        with self._lock:
            self._by_address[mapping.address] = mapping

    def holding(self, address: int) -> tuple[Mapping, int] | None:
        """The mapping that an address is in, and the offset in it."""
        with self._lock:  # `valuerefs` is a copy: threads that drop mappings change the dictionary meanwhile
            starts = sorted(reference.key for reference in self._by_address.valuerefs())  # type: ignore[attr-defined]
        place = bisect_right(starts, address) - 1
        mapping = self._by_address.get(starts[place]) if place >= 0 else None
        if mapping is None or address - starts[place] >= len(mapping):
            return None
        return mapping, address - starts[place]


_mappings = _Mappings()


def read(origin: Origin, target: torch.Tensor) -> None:
    """Fill the flat host tensor `target` from a file, converted to its dtype; memory: `CHUNK_BYTES` if converted."""
    if origin.dtype == target.dtype:
        origin.file.read_into(_bytes(target), origin.offset)
        return
    done = 0
    for piece in pieces(origin):
        target[done : done + piece.numel()].copy_(piece)
        done += piece.numel()


def pieces(origin: Origin) -> Iterator[torch.Tensor]:
    """The numbers as they are in the file, in order, in one reused buffer of at most `CHUNK_BYTES`."""
    size = CHUNK_BYTES // origin.dtype.itemsize * origin.dtype.itemsize
    scratch = torch.empty(min(size, origin.nbytes), dtype=torch.uint8)
    for start in range(0, origin.nbytes, size):
        raw = scratch[: min(size, origin.nbytes - start)]
        origin.file.read_into(_bytes(raw), origin.offset + start)
        yield raw.view(origin.dtype)


def _bytes(flat: torch.Tensor) -> memoryview:
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    content = os.read(descriptor, len(target))
    target[: len(content)] = content
    return len(content)


def _write_at(descriptor: int, content: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, content)
