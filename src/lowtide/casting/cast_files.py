"""Weights in 8 or 4 bits in checkpoints: a tensor of small numbers under the weight's name, its scale beside it.

Weights in blocks are uint8 `[rows, blocks of a row, bytes of a block]`, with the scales in the blocks: 18 bytes mean
int4, 34 mean 8 bits; see `lowtide.ops.block_layout`. For others the scale of NAME is NAME_scale, float32, with one
entry for each output channel and 1 in every other dimension; a plain cast has none. Such a checkpoint is loaded as it
was saved: its weights stay in so few bits, in the mapped file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from lowtide.casting.block_weight import BlockWeight
from lowtide.casting.cast_leaf import install
from lowtide.casting.cast_weight import CastWeight, small_of
from lowtide.casting.int8_weight import Int8Weight
from lowtide.casting.lazily_packed import can_pack
from lowtide.memory.store import DiskRest
from lowtide.memory.weight import View
from lowtide.ops.block_layout import BLOCK, LAYOUTS, in_whole_blocks
from lowtide.ops.quantization import STORAGE
from lowtide.weights.files import InFile, Origin, WeightFile
from lowtide.weights.fill import WeightsMismatchError, dtype_by_name, load_tensors
from lowtide.weights.index import CheckpointIndex, TensorEntry
from lowtide.weights.layout import contiguous_stride
from lowtide.weights.names import SCALE_SUFFIX
from lowtide.weights.slots import Slot, slots

SMALL = (*STORAGE.values(), torch.uint8)
"""Dtypes of weights in 8 bits, and in blocks."""


def resting_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `module.state_dict()` gives, but weights in 8 or 4 bits as they rest, each followed by its scale."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        small = small_of(tensor)
        if small is None:
            state[name] = tensor.detach()
        else:
            state[name], scale = small.saved()
            if scale is not None:
                state[name + SCALE_SUFFIX] = scale
    return state


@dataclass(frozen=True, eq=False)
class SavedWeight:
    """One weight that a checkpoint holds in 8 or 4 bits: its places in the module, and in the file."""

    slots: tuple[Slot, ...]
    values: TensorEntry
    scale: TensorEntry | None


def saved_weights(module: nn.Module, index: CheckpointIndex) -> tuple[list[SavedWeight], CheckpointIndex]:
    """The weights that `index` holds in 8 or 4 bits for a module on meta, and the index of all the others.

    Raises `WeightsMismatchError` for a shape that differs, and for int8 without its scale.
    """
    groups: dict[int, list[Slot]] = {}
    for slot in slots(module):
        if slot.kind == "parameter" and slot.tensor.is_floating_point():
            groups.setdefault(id(slot.tensor), []).append(slot)
    saved: list[SavedWeight] = []
    used: set[str] = set()
    for group in groups.values():
        names = [slot.name for slot in group]
        name = next((candidate for candidate in names if candidate in index), None)
        if name is None or index[name].dtype not in SMALL:
            continue
        scales = [] if index[name].dtype == torch.uint8 else [name + SCALE_SUFFIX for name in names]
        scale = next((index[scale] for scale in scales if scale in index), None)
        _check(name, group[0], index[name], scale)
        saved.append(SavedWeight(tuple(group), index[name], scale))
        used.update(names, scales)
    entries = {name: entry for name, entry in index.items() if name not in used}
    return saved, CheckpointIndex(entries, index.files, index.metadata)


def place(
    module: nn.Module,
    saved: Iterable[SavedWeight],
    dtype: torch.dtype,
    own_dtypes: Mapping[str, torch.dtype],
    *,
    int8_matmul: bool = False,
) -> None:
    """Let the weights rest in their file; nothing but the scales is read.

    They compute in `dtype`, but for those that `own_dtypes` gives another one, as for `fill`. With `int8_matmul` layers
    multiply by those in int8 as they are, as `Casting` says.
    """
    files: dict[object, WeightFile] = {}
    made: list[CastWeight] = []
    for stored in saved:
        entry = stored.values
        if entry.file not in files:
            files[entry.file] = WeightFile(entry.file)
        rest = DiskRest(Origin(files[entry.file], entry.offset, entry.nbytes, entry.dtype), entry.dtype)
        shape = tuple(stored.slots[0].tensor.shape)
        wanted = dtype_by_name((slot.name for slot in stored.slots), own_dtypes, dtype)
        views = [View(slot, 0, shape, contiguous_stride(shape), wanted, requires_grad=False) for slot in stored.slots]
        weight = _resting(views, rest, entry, int8_matmul=int8_matmul)
        weight.forget_given()
        if stored.scale is not None:
            weight.set_scale(_read(stored.scale))
        made.append(weight)
    install(module, made)


def _resting(views: list[View], rest: DiskRest, entry: TensorEntry, *, int8_matmul: bool) -> CastWeight:
    """A weight that rests in its file."""
    cpu = torch.device("cpu")
    if entry.dtype == torch.uint8:
        return BlockWeight(views, rest, cpu, LAYOUTS[entry.shape[-1]])
    weight = CastWeight(views, rest, cpu, entry.dtype)
    multiplies = int8_matmul and entry.dtype == torch.int8 and can_pack(weight)
    return Int8Weight(views, rest, cpu, entry.dtype) if multiplies else weight


def in_file_of(entry: TensorEntry) -> InFile:
    """How a tensor of a checkpoint lies there for a network of ours, in which small numbers stay small."""
    lying = InFile.at(entry.offset, entry.dtype)
    return replace(lying, small=entry.nbytes) if entry.dtype in SMALL else lying


def computing_dtype(index: CheckpointIndex, but: Collection[str] = ()) -> torch.dtype:
    """The dtype that a checkpoint with weights in 8 or 4 bits was computed in: that of the others, else float32.

    Those that match a pattern (`fnmatch`) of `but` do not count.
    """
    counted = (entry for name, entry in index.items() if not any(fnmatchcase(name, pattern) for pattern in but))
    floating = (entry.dtype for entry in counted if entry.dtype.is_floating_point)
    return next(floating, torch.float32)


def _read(entry: TensorEntry) -> torch.Tensor:
    index = CheckpointIndex({"scale": entry}, (entry.file,), {})
    return load_tensors(index, dtype=torch.float32)["scale"].clone()


def _check(name: str, slot: Slot, values: TensorEntry, scale: TensorEntry | None) -> None:
    shape = tuple(slot.tensor.shape)
    if values.dtype == torch.uint8:
        _check_blocks(name, shape, values)
    elif values.shape != shape:
        raise WeightsMismatchError(f"{name}: {list(shape)} in the model, {list(values.shape)} in {values.file}.")
    if scale is None and values.dtype == torch.int8:
        raise WeightsMismatchError(f"{name} is int8 in {values.file}, and {name}{SCALE_SUFFIX} is not there.")
    if scale is not None:
        wide = [dim for dim, size in enumerate(scale.shape) if size != 1]
        fits = len(scale.shape) == len(shape) and all(scale.shape[dim] == shape[dim] for dim in wide)
        if not fits or len(wide) > 1 or not scale.dtype.is_floating_point:
            raise WeightsMismatchError(
                f"{name}{SCALE_SUFFIX} in {scale.file} is {scale.dtype} {list(scale.shape)}; it must have one number "
                f"for each output channel of {list(shape)}, and 1 in the other dimensions."
            )


def holds_in_blocks(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a weight of this shape in blocks."""
    fits = in_whole_blocks(shape) and any(layout.shape(shape) == entry.shape for layout in LAYOUTS.values())
    return entry.dtype == torch.uint8 and fits


def _check_blocks(name: str, shape: tuple[int, ...], values: TensorEntry) -> None:
    if not holds_in_blocks(values, shape):
        raise WeightsMismatchError(
            f"{name}: {list(shape)} in the model, uint8 {list(values.shape)} in {values.file}. Weights in blocks are "
            f"[rows, numbers of a row / {BLOCK}, 18 or 34 bytes]."
        )
