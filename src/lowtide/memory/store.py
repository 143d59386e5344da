"""Where the bytes of weights rest: in a file, in host memory, on the device. Each of them is a flat row of bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from lowtide.memory.forms import Tier
from lowtide.sizes import format_bytes
from lowtide.weights.files import Mapping, Origin, SpillFile, WeightFile, bring_in, let_go, read


class Rest(Protocol):
    """The resting bytes of one weight, `nbytes` of them."""

    tier: Tier

    def on_host(self) -> torch.Tensor:
        """The bytes in host memory, flat uint8; of a file, a view that brings them in as they are touched."""
        ...

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        ...


class HostRest:
    """Bytes in host memory."""

    tier = Tier.HOST

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat

    def on_host(self) -> torch.Tensor:
        """The bytes themselves."""
        return self.flat

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        target.copy_(self.flat[start : start + target.numel()])


class DeviceRest:
    """Bytes on the device, where they stay."""

    tier = Tier.DEVICE

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat

    def on_host(self) -> torch.Tensor:
        """The bytes, copied to the host if the device is another."""
        return self.flat.cpu()

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on."""
        target.copy_(self.flat[start : start + target.numel()])


class DiskRest:
    """Bytes in a file. Numbers of another dtype than `dtype` are converted whenever they are read."""

    tier = Tier.DISK

    def __init__(self, origin: Origin, dtype: torch.dtype) -> None:
        self.origin = origin
        self.dtype = dtype
        self._window: Mapping | None = None

    @property
    def mappable(self) -> bool:
        """Whether the bytes can be used as they lie in the file."""
        return self.origin.dtype == self.dtype and self.origin.offset % self.dtype.itemsize == 0

    def on_host(self) -> torch.Tensor:
        """The bytes for somebody to keep: a private view of the file, or a copy where it must be converted."""
        if self.mappable:
            return _flat(self.origin.file.mapping(), self.origin)
        numbers = torch.empty(self.origin.nbytes // self.origin.dtype.itemsize, dtype=self.dtype)
        read(self.origin, numbers)
        return numbers.view(torch.uint8)

    def copy_into(self, target: torch.Tensor, start: int = 0) -> None:
        """Fill a flat uint8 tensor in host memory with the bytes from `start` on, counted as they work."""
        first, count = start // self.dtype.itemsize, target.numel() // self.dtype.itemsize
        offset, size = self.origin.offset, self.origin.dtype.itemsize
        read(replace(self.origin, offset=offset + first * size, nbytes=count * size), target.view(self.dtype))

    def window(self) -> torch.Tensor:
        """The bytes as a view of a mapping that only the engine uses, flat uint8; `mappable` ones only."""
        if self._window is None:
            self._window = self.origin.file.mapping("window")
        return _flat(self._window, self.origin)


class Window:
    """Parts of mapped files that are brought in and let go together; neighbours are one part."""

    def __init__(self, rests: Iterable[DiskRest]) -> None:
        self._files: list[WeightFile] = []
        self._parts: list[tuple[int, int]] = []
        for rest in sorted(rests, key=lambda one: one.window().data_ptr()):
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
            free = format_bytes(shutil.disk_usage(self._folder).free) if self._folder.is_dir() else "unknown"
            raise OSError(
                error.errno,
                f"{format_bytes(flat.numel())} of weights cannot be written to {self._folder} ({error.strerror}; free: "
                f"{free}). Choose another folder (offload_to_disk_path or spill_folder), or rest='host'.",
            ) from error


def _flat(mapping: Mapping, origin: Origin) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.frombuffer(mapping, dtype=torch.uint8, count=origin.nbytes, offset=origin.offset)
