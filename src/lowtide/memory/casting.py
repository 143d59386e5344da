"""Layerwise casting: weights rest in 8 bits, and are dequantized around the calls of the layer that they belong to.

A leaf (one layer, or several that share a weight) gets a `_call_impl` of its own, as units do in `attach.py`, but
inside of theirs: whatever rule moves the weights moves 8-bit bytes, and the leaf turns into numbers what has come.
Between calls a slot holds a placeholder, which is dequantized for one operation if somebody reads it. Embeddings are
never dequantized whole: their placeholder gives the rows that are asked for.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lowtide.memory.blocks import with_atomic
from lowtide.memory.forms import Casting
from lowtide.memory.gather import PLAIN, gather, is_plain
from lowtide.memory.overrides import Overrides
from lowtide.memory.rests import on_disk
from lowtide.memory.scratch import SCRATCH
from lowtide.memory.small import FLOATING, CastWeight, can_multiply, in_fp8, small_of
from lowtide.memory.store import DiskRest
from lowtide.memory.tracing import Uncompiled, refuse_tracing
from lowtide.memory.unit import aligned
from lowtide.memory.weight import Weight, spoil
from lowtide.ops.quantization import STORAGE
from lowtide.weights.files import let_go_of_file, origin_of
from lowtide.weights.fill import dtype_by_name
from lowtide.weights.slots import emptied, slots

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)

_MARK = "_lowtide_leaf"


class Call:
    """One call of a leaf. An interrupt may keep it from taking leave; it is forgotten with its frame then."""


class Leaf:
    """Layers whose weights are dequantized together, around the calls of `triggers`; each weight is in one leaf."""

    def __init__(self, triggers: Sequence[nn.Module], weights: Sequence[CastWeight]) -> None:
        self.weights = list(weights)
        self.room = 0
        """Bytes to take at least: what the largest leaf of the same module needs, so that one buffer serves all."""
        self._triggers = triggers
        self._overrides = Overrides(_MARK)
        self._lock = threading.Lock()
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._flat: torch.Tensor | None = None
        self._placed: list[tuple[CastWeight, list[torch.Tensor], list[int]]] = []

    def install(self) -> None:
        """Let the placeholders in, and the calls through this leaf."""
        for weight in self.weights:
            weight.lay_down()
        if any(not weight.gives_rows for weight in self.weights):
            for module in self._triggers:
                self._overrides.set(module, "_call_impl", self._around(module, module._call_impl))
        for weight in self.weights:
            if weight.multiplies:
                layer: Any = weight.views[0].slot.owner
                self._overrides.set(layer, "forward", in_fp8(layer, weight))
        for module in self.owners:
            self._overrides.set(module, "_apply", self._applied(module, module._apply))
            self._overrides.set(module, "_load_from_state_dict", self._loaded(module._load_from_state_dict))
            module.__dict__[_MARK] = self
        for module in {*self.owners, *self._triggers}:
            self._overrides.set_state(module)

    @property
    def owners(self) -> set[nn.Module]:
        """The layers."""
        return {view.slot.owner for weight in self.weights for view in weight.views}

    def undo(self) -> None:
        """Leave placeholders in the slots and the modules as they were otherwise."""
        self._overrides.put_back()
        self._disown_replaced()

    def _working(self) -> list[CastWeight]:
        return [weight for weight in self.weights if weight.is_dequantized]

    @property
    def working_bytes(self) -> int:
        """Bytes of the numbers while they work."""
        return sum(aligned(weight.working_bytes) for weight in self._working())

    # ---- two verbs

    def enter(self, call: Call) -> None:
        """Dequantize, if it is the first call that needs it."""
        with self._lock:
            if not self._calls:
                self._lift()  # what an interrupted call may have left
                self._place()
            self._calls.add(call)

    def leave(self, call: Call) -> None:
        """Drop the numbers after the last call. Right also for a call whose `enter` did not come to its end."""
        with self._lock:
            self._calls.discard(call)
            if not self._calls:
                self._lift()

    def _place(self) -> None:
        self._disown_replaced()
        if not self._working():
            return
        self._flat = SCRATCH.take(max(self.room, self.working_bytes), self.weights[0].device)
        place = 0
        for weight in self._working():
            part = self._flat[place : place + weight.working_bytes]
            weight.dequantize_into(part)
            place += aligned(weight.working_bytes)
            tensors = weight.tensors(part)
            self._placed.append((weight, tensors, [tensor._version for tensor in tensors]))  # before they are in slots
            weight.put(tensors)

    def _disown_replaced(self) -> None:
        for weight in self.weights:
            weight.disown_replaced()
        self.weights = [weight for weight in self.weights if weight.views]

    def _lift(self) -> None:
        """May be called again after an interrupt anywhere in it."""
        while self._placed:
            weight, tensors, versions = self._placed[-1]
            if weight.is_changed(tensors, versions):
                weight.adopt(tensors)
            weight.lay_down()
            self._placed.pop()
            spoil(tensors)  # counts as a write: not before it is certain that nobody looks for writes any more
        self.weights = [weight for weight in self.weights if weight.views]
        if self._flat is not None:
            SCRATCH.give(self._flat)
            self._flat = None

    # ---- the overrides

    def _for_others(self, result: torch.Tensor) -> torch.Tensor:
        """A result that lies in the numbers of this leaf, such as a parameter itself, as a copy: they are gone soon."""
        is_lent = self._flat is not None and result.layout == torch.strided and type(result) in PLAIN
        is_own = is_lent and result.untyped_storage().data_ptr() == self._flat.untyped_storage().data_ptr()  # type: ignore[union-attr]
        return result.clone() if is_own else result

    def _around(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        enter, leave = Uncompiled(self.enter), Uncompiled(self.leave)

        def dequantized_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(module)
            this = Call()
            try:
                enter(this)
                return tree_map_only(torch.Tensor, self._for_others, call(*args, **kwargs))
            finally:
                leave(this)

        return dequantized_call

    def _applied(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """`_apply` (`.to`, `.half` and so on) for a module: its 8-bit weights follow, without a way through numbers."""

        def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
            self._disown_replaced()
            own = [weight for weight in self.weights if any(view.slot.owner is module for view in weight.views)]
            with emptied(view.slot for weight in own for view in weight.views if view.slot.owner is module):
                method(fn, recurse)
            for weight in own:
                weight.follow(fn)
            return module

        return apply

    def _loaded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`_load_from_state_dict`: what is loaded is quantized."""

        def load(*args: Any, **kwargs: Any) -> None:
            self._disown_replaced()
            before = [(weight, weight.tensors(weight.flat_for_now())) for weight in self.weights]
            versions = [[tensor._version for tensor in tensors] for _, tensors in before]
            for weight, tensors in before:
                weight.put(tensors)
            try:
                method(*args, **kwargs)
            finally:
                for (weight, tensors), known in zip(before, versions, strict=True):
                    loaded = weight.views[0].slot.now()
                    if weight.is_changed(tensors, known) and loaded is not None:
                        weight.take(loaded)
                    weight.lay_down()

        return load


def cast(
    module: nn.Module, casting: Casting, *, at_rest: bool = False, own_dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Let the weights of `module` that `casting` means rest in 8 bits, one after another; the others are left alone.

    Weights whose name matches a pattern (`fnmatch`) of `own_dtypes` compute in the dtype that it gives.
    With `at_rest` another rule takes them over afterwards. Layers that `casting` means and that are cast in another way
    are cast anew. Raises `ValueError` for weights that are on meta, or that a scale is not possible for; what was cast
    until then stays so.
    """
    chosen = set(_chosen(module, casting))
    meant = [leaf for leaf in leaves(module) if not chosen.isdisjoint(leaf.owners)]
    _undo([leaf for leaf in meant if not all(_is_so(weight, casting) for weight in leaf.weights)], at_rest=at_rest)
    weights = meant_by(casting, module, _own_weights(module))
    compute = None if casting.compute is None else getattr(torch, casting.compute)
    made: list[CastWeight] = []
    try:
        while weights:
            weight = weights.pop()
            names = (view.slot.name for view in weight.views)
            made.append(_cast_weight(weight, casting, dtype_by_name(names, own_dtypes or {}, compute)))
    finally:
        install(module, made)


def install(module: nn.Module, weights: Iterable[CastWeight]) -> None:
    """Bring weights that rest in 8 bits to their layers, inside `module`."""
    homes = {id(inner): atomic or inner for inner, atomic in with_atomic(module, None)}
    groups: dict[int, tuple[list[nn.Module], list[CastWeight]]] = {}
    for weight in weights:
        triggers = [homes[id(view.slot.owner)] for view in weight.views]
        merged: tuple[list[nn.Module], list[CastWeight]] = ([], [weight])
        for found in {id(groups[id(one)]): groups[id(one)] for one in triggers if id(one) in groups}.values():
            merged = (merged[0] + found[0], merged[1] + found[1])
        merged = (list({id(one): one for one in [*merged[0], *triggers]}.values()), merged[1])
        groups.update({id(one): merged for one in merged[0]})
    made = [Leaf(triggers, group) for triggers, group in {id(one): one for one in groups.values()}.values()]
    room = max((leaf.working_bytes for leaf in made), default=0)
    for leaf in made:
        leaf.room = room
        leaf.install()


def uncast(module: nn.Module, *, at_rest: bool = False) -> None:
    """Have the weights as they were before they were cast: those of a checkpoint as its file has them.

    With `at_rest` another rule takes them over. Others keep the values that their 8 bits hold, in the dtype they
    compute in; a warning says so.
    """
    _undo(leaves(module), at_rest=at_rest)


def _undo(undone: list[Leaf], *, at_rest: bool) -> None:
    rounded = [weight.name for leaf in undone for weight in leaf.weights if weight.original is None]
    for leaf in undone:
        leaf.undo()
        for weight in leaf.weights:
            weight.restore_numbers(at_rest=at_rest)
    if rounded:
        warnings.warn(
            f"{len(rounded)} weights ({rounded[0]} and so on) are in no file, so they keep the values that their 8 "
            "bits hold. Load the model again to have them as they were.",
            stacklevel=5,
        )


def _is_so(weight: CastWeight, casting: Casting) -> bool:
    """Whether a weight is cast already as `casting` says."""
    same_dtype = casting.compute is None or weight.dtype == getattr(torch, casting.compute)
    multiplies = casting.fp8_matmul and (weight.multiplies or can_multiply(weight))
    return (
        same_dtype
        and weight.multiplies == multiplies
        and weight.storage == STORAGE[casting.storage]
        and (weight.scale is not None) == casting.scaled
    )


def leaves(module: nn.Module) -> list[Leaf]:
    """The leaves inside `module` whose weights are cast."""
    found = (inner.__dict__.get(_MARK) for inner in module.modules())
    return list({id(leaf): leaf for leaf in found if leaf is not None}.values())


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
    return (
        all(one.slot.owner in chosen and one.slot.kind == "parameter" and one.key == view.key for one in weight.views)
        and view.dtype in FLOATING
        and len(view.shape) > (1 if casting.scaled else 0)
        and weight.nbytes == view.dtype.itemsize * torch.Size(view.shape).numel()
    )


def _cast_weight(weight: Weight, casting: Casting, compute: torch.dtype | None) -> CastWeight:
    view = weight.views[0]
    if weight.rest is None:
        raise ValueError(f"{weight.name} is on meta: it has a shape and no values to cast. Load the model first.")
    original = on_disk(weight)
    flat = weight.rest.flat if hasattr(weight.rest, "flat") else weight.rest.on_host()
    dim = 1 if isinstance(view.slot.owner, TRANSPOSED) else 0
    numbers = view.of(flat).detach()
    if original is None and (origin := origin_of(numbers, flat)) is not None:  # a view of a file, or converted from it
        original = DiskRest(origin, view.dtype, (view.shape, view.stride))
    made = CastWeight.of(weight, numbers, STORAGE[casting.storage], casting.scaled, dim, compute)
    made.multiplies = casting.fp8_matmul and can_multiply(made)
    if original is not None:
        made.keep_original(original, view)
    let_go_of_file(numbers)
    made.lay_down()
    return made
