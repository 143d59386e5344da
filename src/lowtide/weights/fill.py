"""Fill a module built on meta from a checkpoint: an exact match, or one error that lists both sides.

Where the dtype matches, on the CPU, a tensor is a view of the file's memory mapping: no bytes are copied, pages come in
as they are touched, and a write stays private to the process. Such a tensor is aligned to its item size only, not to
64 bytes as fresh ones are, so a matrix product may sum in another order and differ in the last bits.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lowtide.weights.index import CheckpointError, CheckpointIndex, TensorEntry

CHUNK_BYTES = 16 * 2**20
"""Memory beyond the new tensors that a conversion takes."""

_ROWS = 20  # listed per kind of mismatch
_ROW_LENGTH = 300

# Without this flag Linux refuses to map more than the RAM there is, although a private page costs nothing until it is
# written. Python names the flag from 3.13 on; the number is that of x86 and ARM.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


class WeightsMismatchError(CheckpointError):
    """The tensors of a checkpoint are not those of the module."""


@dataclass(frozen=True)
class _Slot:
    """One place of a tensor in a module. Transient: a buffer that checkpoints do not hold."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: torch.Tensor
    kind: Literal["parameter", "buffer", "transient"]


def state_names(module: nn.Module) -> set[str]:
    """Names of all parameters and persistent buffers, every name of a tied one included."""
    return {slot.name for slot in _slots(module) if slot.kind != "transient"}


def fill(
    module: nn.Module,
    index: CheckpointIndex,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_dtype: Collection[str] = (),
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Put the tensors of `index` into `module`, all or none; no parameter requires a gradient afterwards.

    Floating-point tensors become `dtype` (None: that of the file), but for names matching a pattern (`fnmatch`) of
    `keep_dtype`. A tied parameter needs one of its names in the file and stays one storage. `buffers` are the
    non-persistent ones, which no file holds: each that is on meta must be given. Peak memory: the new tensors that are
    not views of the file, plus `CHUNK_BYTES`. Raises `WeightsMismatchError` if any name, shape or kind of number
    differs, `ValueError` if `buffers` do not suit, `CheckpointError` if a file has changed since it was indexed.
    """
    slots = list(_slots(module))
    groups = _by_tensor(slot for slot in slots if slot.kind != "transient")
    _check_match(module, index, groups)
    transient = _match_buffers(module, [slot for slot in slots if slot.kind == "transient"], buffers or {})
    sources = [next(slot.name for slot in group if slot.name in index) for group in groups]
    tensors = load_tensors(index, sources, dtype=dtype, device=device, keep_dtype=keep_dtype)
    for group, source in zip(groups, sources, strict=True):
        _place(group, tensors[source])
    for slot, tensor in transient:
        _place([slot], tensor.to(device))
    assert not any(slot.tensor.is_meta for slot in _slots(module)), "a tensor was left on meta"


def load_tensors(
    index: CheckpointIndex,
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_dtype: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Read the tensors called `names` (None: all), as views of the file wherever that is possible; see `fill`."""
    reader = _Reader(torch.device(device))
    chosen = index if names is None else names
    return {name: reader.load(index[name], _target_dtype(name, index[name], dtype, keep_dtype)) for name in chosen}


def _target_dtype(name: str, entry: TensorEntry, dtype: torch.dtype | None, keep: Collection[str]) -> torch.dtype:
    keeps = dtype is None or not entry.dtype.is_floating_point or any(fnmatchcase(name, pattern) for pattern in keep)
    return entry.dtype if keeps or dtype is None else dtype


class _Reader:
    """Turns entries into tensors: a view of the mapped file, or a copy made chunk by chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mappings: dict[Path, mmap.mmap] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def load(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype, device=self.device)
        is_aligned = entry.offset % entry.dtype.itemsize == 0
        if self.device.type == "cpu" and entry.dtype == dtype and is_aligned:
            return self._view(entry)
        return self._copy(entry, dtype)

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        if entry.file not in self._mappings:
            self._mappings[entry.file] = _map(entry.file)
        mapping = self._mappings[entry.file]
        _check_size(entry, len(mapping))
        count = entry.nbytes // entry.dtype.itemsize
        # The tensor holds the mapping, and the mapping the file, for as long as it lives.
        return torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    def _copy(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        target = torch.empty(entry.shape, dtype=dtype, device=self.device)
        flat, done = target.view(-1), 0
        for piece in self._pieces(entry):
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
        return target

    def _pieces(self, entry: TensorEntry) -> Iterator[torch.Tensor]:
        """The tensor's elements in order, in one reused buffer of at most `CHUNK_BYTES`."""
        if self._scratch.numel() < min(entry.nbytes, CHUNK_BYTES):
            self._scratch = torch.empty(min(max(entry.nbytes, 2**20), CHUNK_BYTES), dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.nbytes, CHUNK_BYTES):
                raw = self._scratch[: min(CHUNK_BYTES, entry.nbytes - start)]
                _read_exactly(stream, entry, raw.numpy().data)
                yield raw.view(entry.dtype)

    def same_bytes(self, one: TensorEntry, other: TensorEntry) -> bool:
        """Whether two entries hold the same bytes."""
        if one == other:
            return True
        others = _Reader(self.device)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(self._pieces(one), others._pieces(other), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _map(file: Path) -> mmap.mmap:
    """A private, writable mapping of the whole file: writes never reach the file."""
    with file.open("rb") as stream:
        if sys.platform == "win32":
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(stream.fileno(), 0, flags=flags, prot=protection)


def _check_size(entry: TensorEntry, size: int) -> None:
    if entry.offset + entry.nbytes > size:
        raise CheckpointError(f"{entry.file}: the file has become shorter since its header was read. Load it again.")


def _read_exactly(stream: FileIO, entry: TensorEntry, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:])
        if not count:
            raise CheckpointError(
                f"{entry.file}: the file has become shorter since its header was read. Load it again."
            )
        done += count


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Every place of a tensor, shared modules and tied tensors under each of their names."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield _Slot(dot + leaf, owner, leaf, parameter, "parameter")
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                is_transient = leaf in owner._non_persistent_buffers_set
                yield _Slot(dot + leaf, owner, leaf, buffer, "transient" if is_transient else "buffer")


def _by_tensor(slots: Iterable[_Slot]) -> list[list[_Slot]]:
    groups: dict[int, list[_Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.tensor), []).append(slot)
    return list(groups.values())


def _place(group: Iterable[_Slot], tensor: torch.Tensor) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for slot in group:
        if slot.kind == "parameter":
            slot.owner._parameters[slot.leaf] = parameter
        else:
            slot.owner._buffers[slot.leaf] = tensor


def _match_buffers(
    module: nn.Module, slots: list[_Slot], given: Mapping[str, torch.Tensor]
) -> list[tuple[_Slot, torch.Tensor]]:
    known = {slot.name: slot for slot in slots}
    unknown = sorted(given.keys() - known.keys())
    needed = sorted(name for name, slot in known.items() if slot.tensor.is_meta and name not in given)
    wrong = sorted(name for name in given.keys() & known.keys() if given[name].shape != known[name].tensor.shape)
    if unknown or needed or wrong:
        raise ValueError(
            f"Non-persistent buffers of {type(module).__name__} are in no checkpoint and must be passed as `buffers`. "
            f"On meta and not given: {needed}; given but not there: {unknown}; of another shape: {wrong}."
        )
    return [(known[name], tensor) for name, tensor in given.items()]


def _check_match(module: nn.Module, index: CheckpointIndex, groups: list[list[_Slot]]) -> None:
    slots = {slot.name: slot for group in groups for slot in group}
    missing = [" = ".join(s.name for s in group) for group in groups if not any(s.name in index for s in group)]
    unexpected = [f"{name} {list(entry.shape)}" for name, entry in index.items() if name not in slots]
    differing = [fault for name, slot in slots.items() if name in index and (fault := _fault(slot, index[name]))]
    differing += [fault for group in groups if (fault := _tie_fault([s.name for s in group if s.name in index], index))]
    if missing or unexpected or differing:
        raise WeightsMismatchError(
            f"{type(module).__name__} and its weights in {', '.join(map(str, index.files))} do not match. "
            "Check that the configuration belongs to these weights."
            + _listed("In the model, not in the file", missing)
            + _listed("In the file, not in the model", unexpected)
            + _listed("Different in the two", differing)
        )


def _fault(slot: _Slot, entry: TensorEntry) -> str | None:
    model_shape, model_dtype = tuple(slot.tensor.shape), slot.tensor.dtype
    if entry.shape != model_shape:
        return f"{slot.name}: {list(model_shape)} in the model, {list(entry.shape)} in the file"
    if _number_kind(entry.dtype) != _number_kind(model_dtype):
        return f"{slot.name}: {model_dtype} in the model, {entry.dtype} in the file"
    return None


def _number_kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype == torch.bool else "integer"


def _tie_fault(names: list[str], index: CheckpointIndex) -> str | None:
    """A file may hold a tied parameter under several names, if all of them say the same."""
    reader = _Reader(torch.device("cpu"))
    if all(reader.same_bytes(index[names[0]], index[name]) for name in names[1:]):
        return None
    return f"{' = '.join(names)}: one tied tensor in the model, different values in the file"


def _listed(title: str, rows: list[str]) -> str:
    if not rows:
        return ""
    shown = [row[:_ROW_LENGTH] for row in rows[:_ROWS]] + (
        [f"... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else []
    )
    return f"\n{title} ({len(rows)}):" + "".join(f"\n  {row}" for row in shown)
