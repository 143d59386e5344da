"""A leaf whose weights rest in 8 bits: they are dequantized around its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowtide.calls import Call, Calls
from lowtide.casting.cast_weight import CastWeight
from lowtide.casting.scratch import SCRATCH, flat_on
from lowtide.forks import new_lock
from lowtide.machine.accelerators import computing_stream, is_capturing
from lowtide.memory.blocks import with_atomic
from lowtide.memory.bounds import aligned
from lowtide.memory.copy_out import copied_out
from lowtide.memory.no_tracing import Uncompiled, refuse_tracing
from lowtide.memory.overrides import Overrides
from lowtide.memory.placeholder import spoil
from lowtide.weights.slots import emptied

_MARK = "_lowtide_leaf"


class Leaf:
    """Layers whose weights are dequantized together, around the calls of `triggers`; each weight is in one leaf."""

    def __init__(self, triggers: Sequence[nn.Module], weights: Sequence[CastWeight]) -> None:
        self.weights = list(weights)
        self.room = 0
        """Bytes to take at least: what the largest leaf of the same module needs, so that one buffer serves all."""
        self._triggers = triggers
        self._overrides = Overrides(_MARK)
        self._lock = new_lock()
        self._calls: Calls[Call] = Calls()
        self._flat: torch.Tensor | None = None
        self._stream: Any = None
        """The one that dequantizes, on an accelerator: whose memory `_flat` is."""
        self._is_captured = False
        """Whether that is recorded in a graph, whose memory `_flat` is then: nobody else may have it."""
        self._placed: list[tuple[CastWeight, list[torch.Tensor], list[int]]] = []

    def install(self) -> None:
        """Let the placeholders in, and the calls through this leaf."""
        for module in self.owners:
            self._overrides.mark(module, _MARK, self)
        for weight in self.weights:
            weight.lay_down()
        if any(not weight.gives_rows for weight in self.weights):
            for module in self._triggers:
                self._overrides.set(module, "_call_impl", self._around(module, module._call_impl))
        for weight in self.weights:
            if weight.multiplies:
                layer: Any = weight.views[0].slot.owner
                self._overrides.set(layer, "forward", weight.forward_of(layer))
        for module in self.owners:
            self._overrides.set(module, "_apply", self._applied(module, module._apply))
            self._overrides.set(module, "_load_from_state_dict", self._loaded(module._load_from_state_dict))
        for module in {*self.owners, *self._triggers}:
            self._overrides.set_state(module)

    @property
    def owners(self) -> set[nn.Module]:
        """The layers."""
        return {view.slot.owner for weight in self.weights for view in weight.views}

    def check_idle(self) -> None:
        """Raise `RuntimeError` if a layer is being called."""
        if self._calls:
            names = " and ".join(sorted({type(module).__name__ for module in self._triggers}))
            raise RuntimeError(f"{names} is being called, so it cannot be changed now. Wait for the end.")

    def undo(self) -> None:
        """Put placeholders into the slots, and put everything else of the modules back."""
        with self._lock:
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
            elif self._flat is not None and (other := self._other_stream()) is not None:
                other.wait_stream(self._stream)
            self._calls.begin(call)

    def leave(self, call: Call) -> None:
        """Drop the numbers after the last call. Right also for a call whose `enter` did not come to its end."""
        with self._lock:
            self._calls.end(call)
            if self._flat is not None and (other := self._other_stream()) is not None:
                self._stream.wait_stream(other)  # before the numbers are written over
            if not self._calls:
                self._lift()

    def _other_stream(self) -> Any:
        """The stream that computes now, where it is not the one that dequantized: a call in another thread, perhaps."""
        now = computing_stream(self.weights[0].device)
        return now if now != self._stream else None

    def _place(self) -> None:
        self._disown_replaced()
        if not self._working():
            return
        device = self.weights[0].device
        self._stream, self._is_captured = computing_stream(device), is_capturing(device)
        nbytes = max(self.room, self.working_bytes)
        self._flat = flat_on(device, nbytes) if self._is_captured else SCRATCH.take(nbytes, device, self._stream)
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
            if not self._is_captured:
                SCRATCH.give(self._flat, self._stream)
            self._flat = self._stream = None

    # ---- the overrides

    def _around(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        enter, leave = Uncompiled(self.enter), Uncompiled(self.leave)

        def dequantized_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(module)
            this = Call()
            try:
                enter(this)
                result = call(*args, **kwargs)
                return result if self._flat is None else copied_out(result, self._flat)
            finally:
                leave(this)

        return dequantized_call

    def _applied(self, module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """`_apply` (`.to`, `.half` and so on) for a module: its 8-bit weights follow without being dequantized."""

        def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
            with self._lock:
                self.check_idle()
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
            with self._lock:
                self.check_idle()
                self._disown_replaced()
                before = [(weight, weight.tensors(weight.flat_for_now())) for weight in self.weights]
                versions = [[tensor._version for tensor in tensors] for _, tensors in before]
                for weight, tensors in before:
                    weight.put(tensors)
                try:
                    method(*args, **kwargs)
                finally:
                    for (weight, tensors), version in zip(before, versions, strict=True):
                        loaded = weight.views[0].slot.now()
                        if weight.is_changed(tensors, version) and loaded is not None:
                            weight.take(loaded)
                        weight.lay_down()

        return load


def install(module: nn.Module, weights: Iterable[CastWeight]) -> None:
    """Bring weights that rest in 8 bits to their layers, inside `module`."""
    homes = {id(inner): atomic or inner for inner, atomic in with_atomic(module, None)}
    groups: dict[int, tuple[list[nn.Module], list[CastWeight]]] = {}
    for weight in weights:
        triggers = [homes[id(view.slot.owner)] for view in weight.views]
        merged: tuple[list[nn.Module], list[CastWeight]] = ([], [weight])
        touched = (groups[id(trigger)] for trigger in triggers if id(trigger) in groups)
        for group in {id(group): group for group in touched}.values():
            merged = (merged[0] + group[0], merged[1] + group[1])
        merged = (list(dict.fromkeys([*merged[0], *triggers])), merged[1])
        groups.update({id(trigger): merged for trigger in merged[0]})
    made = [Leaf(triggers, group) for triggers, group in {id(group): group for group in groups.values()}.values()]
    room = max((leaf.working_bytes for leaf in made), default=0)
    for leaf in made:
        leaf.room = room
        leaf.install()


def leaves(module: nn.Module) -> list[Leaf]:
    """The leaves inside `module` whose weights are cast."""
    marks = (inner.__dict__.get(_MARK) for inner in module.modules())
    return list(dict.fromkeys(leaf for leaf in marks if leaf is not None))
