"""Follow a call on meta tensors: which memory is alive when, and what is computed inside which module.

Nothing is computed. Every operator that would reach a kernel is seen, and the memory of tensors is followed from the
operator that makes it until its last tensor goes, as it would be on the device that is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.memory.overrides import Overrides
from lowtide.ops.meta_device import meant_device, standing_for, taken_note
from lowtide.ops.modes import without_gradients
from lowtide.planning.workload import Call, Work
from lowtide.prediction.caching_allocator import Event, reserved_for
from lowtide.prediction.operators import REWRITTEN, work_of
from lowtide.prediction.repeated_modules import GivenInputs, Repeat, Repeats, Segment, closed
from lowtide.prediction.repeated_operators import result_of
from lowtide.prediction.repeats import form_of_call
from lowtide.prediction.traced_memory import Memory
from lowtide.prediction.workspace import workspace

_NEW = torch.ops.aten.lift_fresh.default
"""Gives what `torch.tensor` has made of numbers, such as tokens and masks: no operator was seen that made it."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A call and what was computed in it, in order."""

    call: Call
    segments: tuple[Segment, ...]

    @property
    def order(self) -> list[nn.Module]:
        """The modules that were called, in the order of their first calls."""
        return list(dict.fromkeys(module for segment in self.segments for module in segment.inside))


def trace(
    fn: Callable[[], Any],
    networks: Iterable[nn.Module],
    inputs: Iterable[torch.Tensor] = (),
    *,
    device: str = "cpu",
) -> Traced:
    """Call `fn`, which computes on meta, as if on a `device` of this type ("cpu" or "cuda"); see `Call` and `Segment`.

    `networks` are those that it calls: copies that nobody else calls while this lasts. `inputs` are the tensors that
    are there from beginning to end. Raises what `fn` raises.
    """
    memory = Memory.of(device)
    for tensor in inputs:
        memory.add(tensor)
    memory.reached(0)
    watch = Watch(memory, Repeats())
    with without_gradients(), standing_for(device), watch.seeing(networks), watch, Rewritten(memory):
        before = memory.alive
        taken_note()
        result = fn()
    left = memory.alive - before
    del result
    watch.close_segment()
    done = sum((segment.work for segment in watch.segments), Work())
    spare = 0 if memory.events is None else spare_of(memory.events, memory.peak)
    return Traced(Call(memory.peak, memory.workspace, left, done, taken_note(), spare=spare), tuple(watch.segments))


def spare_of(events: Iterable[Event], peak: int) -> int:
    """Bytes that a caching allocator needs beyond a peak, for what lies between the tensors."""
    return max(reserved_for(events, is_short=True) - peak, 0)


class Rewritten(TorchFunctionMode):
    """Has functions of several forms take the form that the meant device takes, not that of the meta device.

    Counts tensors that `copy.deepcopy` makes, which no operator does.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if meant_device() is not None and func in REWRITTEN:
            return REWRITTEN[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__:
            self._memory.add(result)
            self._memory.reached(0)
        return result


class Watch(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self, memory: Memory, repeats: Repeats) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._memory = memory
        self._inside: list[nn.Module] = []
        self._done: list[Work] = []
        self._repeats = repeats

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to make sure of that takes as long as most operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = result_of(func, args, kwargs)
        if meant_device() is None:
            return result
        given = list(tensors_in(args))
        given += tensors_in(kwargs.values())
        made = list(tensors_in(result if isinstance(result, (tuple, list)) else (result,)))
        self._count([] if func is _NEW else given, made)
        if not func.is_view:
            self._memory.worked(workspace(func, args, given, made))
            self._done.append(work_of(func, given, made))
        return result

    def _count(self, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        inherited = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in inherited:
                self._memory.add(tensor)

    @contextmanager
    def seeing(self, networks: Iterable[nn.Module]) -> Generator[None]:
        """While this lasts, it is known inside which module an operator is called, and repeated modules are replayed.

        These very modules are changed, not their classes, which other threads call too.
        """
        with ExitStack() as stack:
            for module in dict.fromkeys(part for network in networks for part in network.modules()):
                overrides = Overrides()
                stack.callback(overrides.put_back)
                overrides.set_state(module)  # first: at no moment is a copy made with what it has only here
                overrides.set(module, "_call_impl", self._seen(module, module._call_impl))
            yield

    def _seen(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen_call(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs) if meant_device() is None else self._called(module, call, args, kwargs)

        return seen_call

    def _called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        form = form_of_call(args, kwargs) if module._modules else None
        if form is None:
            return self._followed(module, call, args, kwargs)
        key = self._repeats.signatures.of(module), form[0]
        if key in self._repeats.calls and not _is_watched(module):
            return self._replayed(self._repeats.calls[key], module, form[1], (args, kwargs))
        begun, alive, outer = len(self.segments), self._memory.alive, (self._memory.peak, self._memory.workspace)
        earlier = len(self._memory.events or ())
        self._memory.peak = self._memory.workspace = 0
        self._memory.reached(0)
        given = GivenInputs(form, self._memory)
        del form  # a list may be emptied by the call, and the tensors in it go then
        result = self._followed(module, call, args, kwargs)
        peak, beside = self._memory.peak, self._memory.workspace
        self._memory.peak, self._memory.workspace = max(outer, (peak, beside), key=lambda marks: marks[0])
        outcome = given.outcome(result, args, kwargs)
        if (
            outcome is not None and outcome[2] == self._memory.alive - alive
        ):  # else it keeps something, or lets go of it
            inside = tuple(
                Segment(segment.inside[len(self._inside) :], segment.work)
                for segment in self.segments[begun:]
                if len(segment.inside) > len(self._inside)
            )
            events = closed((self._memory.events or [])[earlier:])
            self._repeats.calls[key] = Repeat(module, peak - alive, beside, *outcome[:2], inside, events)
        return result

    def _followed(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self.close_segment()
        self._inside.append(module)
        try:
            return call(*args, **kwargs)
        finally:
            self.close_segment(even_if_empty=True)
            self._inside.pop()

    def _replayed(self, repeat: Repeat, module: nn.Module, inputs: list[torch.Tensor], given: Any) -> Any:
        self.close_segment()
        self._memory.reached(repeat.peak - repeat.workspace, repeat.workspace)
        if self._memory.events is not None:
            first = len(self._memory.events)
            self._memory.events += [(first + memory, nbytes) for memory, nbytes in repeat.events]
        twins = dict(zip(repeat.module.modules(), module.modules(), strict=True))
        for segment in repeat.segments:
            self.segments.append(Segment((*self._inside, *(twins[part] for part in segment.inside)), segment.work))
        return repeat.made_again(inputs, given)

    def close_segment(self, *, even_if_empty: bool = False) -> None:
        """What was computed since the last segment is one; an empty one tells that a module was called."""
        if self._done or even_if_empty:
            self.segments.append(Segment(tuple(self._inside), sum(self._done, Work())))
            self._done = []


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks of others see calls of this module or of its parts, so that none may be left out."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, in lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
