"""Modules that are called again with inputs of the same form: what a call took and did is known from the first one.

Also of modules that fill lists or dicts that they are given, such as the frames that a causal convolution keeps.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowtide.planning.workload import Work
from lowtide.prediction.caching_allocator import FREED, Event
from lowtide.prediction.repeats import (
    Signatures,
    bases_of,
    form_of_call,
    forms_of_result,
    inputs_in,
    let_go,
    made_again,
    objects_stay,
    refill,
)
from lowtide.prediction.traced_memory import Memory


@dataclass(frozen=True, eq=False)
class Segment:
    """Work done between two calls or ends of modules; `inside` are the modules under way, from the outermost on."""

    inside: tuple[nn.Module, ...]
    work: Work


@dataclass(frozen=True, eq=False)
class Repeat:
    """What one call of a module took beyond what was there, and did.

    Of its `result` the forms are known, and of the inputs that it `left` where it filled or emptied lists or dicts.
    """

    module: nn.Module
    peak: int
    workspace: int
    result: Any
    left: Any
    segments: tuple[Segment, ...]
    events: tuple[Event, ...] = ()

    def made_again(self, inputs: list[torch.Tensor], given: Any) -> Any:
        """The result of a call with such inputs; `given` are its arguments, whose lists and dicts are filled alike.

        `inputs` are the tensors among them, and are taken from this list, so that those that went may go.
        """
        if self.left is None:
            return made_again(self.result, inputs, {})
        needed = set(inputs_in((self.result, self.left)))
        kept = [tensor if place in needed else None for place, tensor in enumerate(inputs)]
        inputs.clear()
        let_go(given)
        result, left = made_again((self.result, self.left), kept, {})
        refill(given, left)
        return result


def closed(events: list[Event]) -> tuple[Event, ...]:
    """Events of what is allocated among them, numbered anew; all of it is freed at the end."""
    numbers: dict[int, int] = {}
    new, closed = itertools.count(), list[Event]()
    for memory, nbytes in events:
        if nbytes != FREED:
            numbers[memory] = next(new)
            closed.append((numbers[memory], nbytes))
        elif memory in numbers:
            closed.append((numbers.pop(memory), FREED))
    return (*closed, *((number, FREED) for number in numbers.values()))


class GivenInputs:
    """The inputs of a call, which are told from what is there after it without being kept alive."""

    def __init__(self, form: tuple[Any, list[torch.Tensor]], memory: Memory) -> None:
        self._form, tensors = form
        self._bases = bases_of(tensors)
        self._memory = memory
        self._identities = [id(tensor) for tensor in tensors]
        self._memories = {
            tensor.untyped_storage()._cdata: _Held(tensor.untyped_storage(), memory) for tensor in tensors
        }

    def outcome(self, result: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, int] | None:
        """The forms of a result and of the inputs, if they were changed, and how many more bytes are alive by them.

        None where not all of it can be made again.
        """
        now = form_of_call(args, kwargs)
        if now is None or not objects_stay(self._form, now[0]):
            return None
        is_unchanged = now[0] == self._form and [id(tensor) for tensor in now[1]] == self._identities
        bases = [base if self._memories[base.memory].is_there() else None for base in self._bases]
        forms = forms_of_result(result, bases, None if is_unchanged else (args, kwargs))
        if forms is None:
            return None
        gone = sum(held.nbytes for held in self._memories.values() if not held.is_there())
        return *forms[:2], sum(map(self._memory.taken, forms[2])) - gone


class _Held:
    """A memory of an input, and the bytes that are counted for it."""

    def __init__(self, storage: torch.UntypedStorage, memory: Memory) -> None:
        self._reference = weakref.ref(storage)
        self.nbytes = memory.taken(storage.nbytes()) if storage._cdata in memory.refs else 0

    def is_there(self) -> bool:
        return self._reference() is not None


class Repeats:
    """What is known of modules that were called before: traces of the same modules may share it."""

    def __init__(self) -> None:
        self.signatures = Signatures()
        self.calls: dict[Any, Repeat] = {}
