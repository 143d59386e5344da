"""Layerwise casting: weights rest in 8 or 4 bits, dequantized around the calls of the layer they belong to.

A leaf (one layer, or several that share a weight) gets a `_call_impl` of its own, as units do in `attach.py`, but
inside theirs: a rule moves the 8-bit bytes, and the leaf dequantizes the bytes that have come.
Between calls a slot holds a placeholder, which is dequantized for one operation if somebody reads it. Embeddings are
never dequantized whole: their placeholder gives the rows that are asked for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from lowtide.casting.block_weight import BlockWeight
from lowtide.casting.cast_leaf import Leaf, install, leaves
from lowtide.casting.cast_weight import FLOATING, CastWeight, small_of
from lowtide.casting.casting import INT4, Casting
from lowtide.casting.int8_weight import Int8Weight
from lowtide.casting.lazily_packed import can_pack
from lowtide.casting.only_products import can_multiply
from lowtide.casting.packed_weight import PackedWeight
from lowtide.memory.module_weights import gather, is_plain
from lowtide.memory.settling import on_disk
from lowtide.memory.weight import Weight
from lowtide.ops.block_layout import Q4_0
from lowtide.ops.quantization import STORAGE
from lowtide.weights.fill import dtype_by_name
from lowtide.weights.provenance import let_go_of_file
from lowtide.weights.slots import slots

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)


def cast(
    module: nn.Module, casting: Casting, *, at_rest: bool = False, own_dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Let the weights of `module` that `casting` means rest in 8 bits, one after another; the others are left alone.

    Weights whose name matches a pattern (`fnmatch`) of `own_dtypes` compute in the dtype that it gives.
    With `at_rest` another rule takes them over afterwards. Layers that `casting` means and that are cast in another way
    are cast anew. Raises `ValueError` for weights that are on meta, or that a scale is not possible for; what was cast
    until then stays so. Raises `RuntimeError` for layers that are being called, by this thread or another.
    """
    chosen = set(_chosen(module, casting))
    meant = [leaf for leaf in leaves(module) if not chosen.isdisjoint(leaf.owners)]
    other = [leaf for leaf in meant if not all(_is_so(weight, casting) for weight in leaf.weights)]
    _undo(other, _left(module), at_rest=at_rest)
    weights = meant_by(casting, module, _own_weights(module))
    compute = None if casting.compute is None else getattr(torch, casting.compute)
    made: list[CastWeight] = []
    try:
        while weights:
            weight = weights.pop()
            names = (view.slot.name for view in weight.views)
            cast_weight = _cast_weight(weight, casting, dtype_by_name(names, own_dtypes or {}, compute))
            cast_weight.lay_down()
            made.append(cast_weight)
    finally:
        install(module, made)


def uncast(module: nn.Module, *, at_rest: bool = False) -> None:
    """Undo a cast: weights of a checkpoint are as its file has them again.

    With `at_rest` another rule takes them over. Others keep the values that their 8 bits hold, in the dtype they
    compute in; a warning says so. Raises `RuntimeError` for layers that are being called, by this thread or another.
    """
    _undo(leaves(module), _left(module), at_rest=at_rest)


def _left(module: nn.Module) -> list[CastWeight]:
    """Weights that rest in 8 bits in no leaf: an interrupt came into their casting, or into the end of it."""
    cast = dict.fromkeys(small for slot in slots(module) if (small := small_of(slot.tensor)) is not None)
    in_leaves = {weight for leaf in leaves(module) for weight in leaf.weights}
    return [weight for weight in cast if weight not in in_leaves]


def _undo(undone: list[Leaf], left: list[CastWeight], *, at_rest: bool) -> None:
    for leaf in undone:
        leaf.check_idle()
    for leaf in undone:
        leaf.undo()
    weights = [*(weight for leaf in undone for weight in leaf.weights), *left]
    rounded = [weight.name for weight in weights if weight.loses and weight.original is None]
    for weight in weights:
        weight.restore_numbers(at_rest=at_rest)
    if rounded:
        warnings.warn(
            f"{len(rounded)} weights ({rounded[0]} and so on) are in no file, so they keep the values that their few "
            "bits hold. Load the model again to have them as they were.",
            stacklevel=5,
        )


def _is_so(weight: CastWeight, casting: Casting) -> bool:
    """Whether a weight is cast already as `casting` says."""
    if isinstance(weight, PackedWeight) or not casting.loses:
        return isinstance(weight, PackedWeight) and not casting.loses
    same_dtype = casting.compute is None or weight.dtype == getattr(torch, casting.compute)
    multiplies = casting.fp8_matmul and (weight.multiplies or can_multiply(weight))
    multiplies = multiplies or (casting.int8_matmul and (weight.multiplies or can_pack(weight)))
    return same_dtype and weight.multiplies == multiplies and _rests_so(weight, casting)


def _rests_so(weight: CastWeight, casting: Casting) -> bool:
    storage = casting.storage_of(weight.form.shape)
    if storage == INT4 or isinstance(weight, BlockWeight):
        return storage == INT4 and isinstance(weight, BlockWeight) and weight.layout is Q4_0
    return weight.storage == STORAGE[storage] and (weight.scale is not None) == casting.scaled


def meant_by(casting: Casting, module: nn.Module, weights: Iterable[Weight]) -> list[Weight]:
    """Those of a module's weights that `casting` means."""
    chosen = set(_chosen(module, casting))
    return [weight for weight in weights if _is_meant(weight, chosen, casting)]


def _chosen(module: nn.Module, casting: Casting) -> Iterator[nn.Module]:
    """The layers that `casting` means."""
    if not casting.skip_patterns and not casting.skip_classes:
        yield from module.modules()
        return
    yield from _walk(module, "", casting)


def _walk(module: nn.Module, name: str, casting: Casting) -> Iterator[nn.Module]:
    is_named = any(re.search(pattern, name) for pattern in casting.skip_patterns)
    if is_named or isinstance(module, casting.skip_classes):
        return
    if isinstance(module, CASTABLE):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, casting)


def _own_weights(module: nn.Module) -> list[Weight]:
    """The weights of `module`, those included that no rule could move."""
    return gather(slot for slot in slots(module) if is_plain(slot) and small_of(slot.tensor) is None)


def _is_meant(weight: Weight, chosen: set[nn.Module], casting: Casting) -> bool:
    """Whether a weight is one floating-point parameter of chosen layers alone, and, with scales, a matrix or more."""
    view = weight.views[0]
    if not casting.loses and not can_pack(weight):
        return False
    return (
        all(
            other.slot.owner in chosen and other.slot.kind == "parameter" and other.key == view.key
            for other in weight.views
        )
        and view.dtype in FLOATING
        and len(view.shape) > (1 if casting.scaled else 0)
        and weight.nbytes == view.dtype.itemsize * torch.Size(view.shape).numel()
    )


def _cast_weight(weight: Weight, casting: Casting, compute: torch.dtype | None) -> CastWeight:
    view = weight.views[0]
    if weight.rest is None:
        raise ValueError(f"{weight.name} is on meta: it has a shape and no values to cast. Load the model first.")
    original = on_disk(weight)
    if not casting.loses:
        return PackedWeight(weight, original, compute)
    flat = weight.rest.flat if hasattr(weight.rest, "flat") else weight.rest.on_host()
    dim = 1 if isinstance(view.slot.owner, TRANSPOSED) else 0
    numbers, storage = view.of(flat).detach(), casting.storage_of(view.shape)
    if storage == INT4:
        made = BlockWeight.in_blocks(weight, numbers, Q4_0, compute)
    else:
        kind = Int8Weight if casting.int8_matmul and can_pack(weight) else CastWeight
        made = kind.of(weight, numbers, STORAGE[storage], casting.scaled, dim, compute)
    made.multiplies |= casting.fp8_matmul and can_multiply(made)
    if original is not None:
        made.keep_original(original, view)
    let_go_of_file(numbers)
    return made


def is_cast(module: nn.Module) -> bool:
    """Whether weights of a module rest in 8 bits."""
    return any(small_of(slot.tensor) is not None for slot in slots(module))
