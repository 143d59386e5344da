"""Fill a module on meta from a checkpoint that matches it exactly; if it does not, one error lists all differences.

On the CPU, where the dtype matches, a tensor is a view of the file's memory mapping: no bytes are copied, pages are
read as they are touched, and a write stays private to the process. A tensor with which kernels would give another
result at its place in the file is copied; see `lowtide.weights.files.InFile.at`.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lowtide.weights.files import CHUNK_BYTES, InFile, Origin, WeightFile, pieces
from lowtide.weights.index import CheckpointError, CheckpointIndex, TensorEntry
from lowtide.weights.provenance import remember_origin
from lowtide.weights.slots import Slot, slots

__all__ = ["CHUNK_BYTES", "WeightsMismatchError", "dtype_by_name", "dtype_name", "fill", "load_tensors", "state_names"]

Otherwise = TypeVar("Otherwise", bound=torch.dtype | None)

_ROWS = 20  # listed per kind of mismatch
_ROW_LENGTH = 300


class WeightsMismatchError(CheckpointError):
    """The tensors of a checkpoint are not those of the module.

    The first line of the message stands alone: file, first difference, and how many more; the others list all of them.
    """


def state_names(module: nn.Module) -> set[str]:
    """Names of all parameters and persistent buffers, every name of a tied one included."""
    return {slot.name for slot in slots(module) if slot.kind != "transient"}


def fill(
    module: nn.Module,
    index: CheckpointIndex,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_dtype: Collection[str] = (),
    own_dtypes: abc.Mapping[str, torch.dtype] | None = None,
    buffers: abc.Mapping[str, torch.Tensor] | None = None,
    leave: Collection[str] = (),
) -> None:
    """Put the tensors of `index` into `module`, all or none; no parameter requires a gradient afterwards.

    Floating-point tensors become `dtype` (None: the file's), except those whose names match a pattern (`fnmatch`) of
    `keep_dtype`; `own_dtypes` gives other dtypes by pattern. A tied parameter needs one of its names in the file and
    stays one storage. `buffers` are the non-persistent buffers, which no file holds: each one on meta must be given.
    Peak memory: the new tensors that are not views of the file, plus `CHUNK_BYTES`. On the device "meta" nothing is
    read: everything is checked, and the module gets the dtypes that it would have; `buffers` are put in as they are.
    Slots named in `leave` are left alone.
    Raises `WeightsMismatchError` if any name, shape or kind of number differs, `ValueError` if `buffers` do not fit,
    `CheckpointError` if a file has changed since it was indexed.
    """
    is_dry = torch.device(device).type == "meta"
    places = [slot for slot in slots(module) if slot.name not in leave]
    groups = _by_tensor(slot for slot in places if slot.kind != "transient")
    _check_match(module, index, groups)
    transient = _match_buffers(module, [slot for slot in places if slot.kind == "transient"], buffers or {})
    sources = [next(slot.name for slot in group if slot.name in index) for group in groups]
    reader = _Reader(torch.device(device))
    wanted = {name: dtype_by_name([name], own_dtypes or {}, dtype) for name in sources}
    tensors = [reader.load(index[name], _target_dtype(name, index[name], wanted[name], keep_dtype)) for name in sources]
    for group, source, tensor in zip(groups, sources, tensors, strict=True):
        placed = _place(group, tensor)
        if tensor.numel() > 0 and not tensor.is_meta:
            remember_origin(placed, reader.origin(index[source]))
    for slot, tensor in transient:
        _place([slot], tensor if is_dry else tensor.to(device))
    left = (slot for slot in slots(module) if slot.name not in leave)
    assert is_dry or not any(slot.tensor.is_meta for slot in left), "a tensor was left on meta"


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


def dtype_by_name(
    names: Iterable[str], own_dtypes: abc.Mapping[str, torch.dtype], otherwise: Otherwise
) -> torch.dtype | Otherwise:
    """The dtype of the first pattern (`fnmatch`) in `own_dtypes` that matches a name of the tensor, or `otherwise`."""
    names = list(names)
    matching = (dtype for pattern, dtype in own_dtypes.items() if any(fnmatchcase(name, pattern) for name in names))
    return next(matching, otherwise)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as plans, castings and our files write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _target_dtype(name: str, entry: TensorEntry, dtype: torch.dtype | None, keep: Collection[str]) -> torch.dtype:
    keeps = dtype is None or not entry.dtype.is_floating_point or any(fnmatchcase(name, pattern) for pattern in keep)
    return entry.dtype if keeps or dtype is None else dtype


class _Reader:
    """Turns entries into tensors: a view of the mapped file, or a copy made chunk by chunk."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._files: dict[Path, WeightFile] = {}

    def origin(self, entry: TensorEntry) -> Origin:
        """Where the bytes of an entry lie, in a file that is open and long enough."""
        if entry.file not in self._files:
            self._files[entry.file] = WeightFile(entry.file)
        file = self._files[entry.file]
        if entry.offset + entry.nbytes > file.size:
            raise CheckpointError(
                f"{entry.file}: the file has become shorter since its header was read. Load it again."
            )
        return Origin(file, entry.offset, entry.nbytes, entry.dtype)

    def load(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        if entry.nbytes == 0 or self.device.type == "meta":
            return torch.empty(entry.shape, dtype=dtype, device=self.device)
        if self.device.type == "cpu" and InFile.at(entry.offset, entry.dtype).works_as(dtype):
            return self._view(entry)
        return self._copy(entry, dtype)

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        origin = self.origin(entry)
        count = entry.nbytes // entry.dtype.itemsize
        # The tensor holds the mapping, and the mapping the file, for as long as it lives.
        mapping = origin.file.mapping()
        return torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    def _copy(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        target = torch.empty(entry.shape, dtype=dtype, device=self.device)
        flat, done = target.view(-1), 0
        for piece in pieces(self.origin(entry)):
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
        return target

    def same_bytes(self, entry: TensorEntry, other: TensorEntry) -> bool:
        """Whether two entries hold the same bytes."""
        if entry == other:
            return True
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(pieces(self.origin(entry)), pieces(self.origin(other)), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _by_tensor(slots: Iterable[Slot]) -> list[list[Slot]]:
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.tensor), []).append(slot)
    return list(groups.values())


def _place(group: Iterable[Slot], tensor: torch.Tensor) -> torch.Tensor:
    parameter = nn.Parameter(tensor, requires_grad=False)
    placed = tensor
    for slot in group:
        placed = parameter if slot.kind == "parameter" else tensor
        slot.put(placed)
    return placed


def _match_buffers(
    module: nn.Module, places: list[Slot], given: abc.Mapping[str, torch.Tensor]
) -> list[tuple[Slot, torch.Tensor]]:
    by_name = {slot.name: slot for slot in places}
    unknown = sorted(given.keys() - by_name.keys())
    needed = sorted(name for name, slot in by_name.items() if slot.tensor.is_meta and name not in given)
    wrong = sorted(name for name in given.keys() & by_name.keys() if given[name].shape != by_name[name].tensor.shape)
    if unknown or needed or wrong:
        raise ValueError(
            f"Non-persistent buffers of {type(module).__name__} are in no checkpoint and must be passed as `buffers`. "
            f"On meta and not given: {needed}; given but not there: {unknown}; of another shape: {wrong}."
        )
    return [(by_name[name], tensor) for name, tensor in given.items()]


def _check_match(module: nn.Module, index: CheckpointIndex, groups: list[list[Slot]]) -> None:
    places = {slot.name: slot for group in groups for slot in group}
    missing = [" = ".join(s.name for s in group) for group in groups if not any(s.name in index for s in group)]
    unexpected = [f"{name} {list(entry.shape)}" for name, entry in index.items() if name not in places]
    differing = [fault for name, slot in places.items() if name in index and (fault := _fault(slot, index[name]))]
    differing += [fault for group in groups if (fault := _tie_fault([s.name for s in group if s.name in index], index))]
    if missing or unexpected or differing:
        raise WeightsMismatchError(
            f"{type(module).__name__} and its weights in {_where(index)} do not match: "
            f"{_first(differing, missing, unexpected)}. Check that the configuration belongs to these weights."
            + _listed("In the model, not in the file", missing)
            + _listed("In the file, not in the model", unexpected)
            + _listed("Different in the two", differing)
        )


def _where(index: CheckpointIndex) -> str:
    """The file, or the folder of several."""
    return ", ".join(map(str, index.files)) if len(index.files) < 2 else str(index.files[0].parent)


def _first(differing: list[str], missing: list[str], unexpected: list[str]) -> str:
    """The first fault in one line, and how many more there are."""
    faults = [*differing, *(f"{row} is not in the file" for row in missing)]
    faults += [f"{row} is not in the model" for row in unexpected]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return " ".join(faults[0][:_ROW_LENGTH].split()) + more


def _fault(slot: Slot, entry: TensorEntry) -> str | None:
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
    """A file may hold a tied parameter under several names, if the tensors of all are equal."""
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
