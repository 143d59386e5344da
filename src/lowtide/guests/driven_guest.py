"""What a call of a foreign pipeline takes: its own code is driven with networks on meta, and followed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lowtide.fitting.meta_subject import MetaSubject
from lowtide.guests.ghost import harmless
from lowtide.guests.guest_call import GuestCall
from lowtide.guests.library import muted
from lowtide.guests.quantized import that_stays
from lowtide.machine.heap import without_collecting
from lowtide.memory.attach import ENTRY_POINTS
from lowtide.ops.modes import without_gradients
from lowtide.planning.workload import BLENDED, EXACT_ON_DISK, SLICED, WHOLE, Call, Component, Stage, Work, Workload
from lowtide.prediction.component import Traced, trace
from lowtide.prediction.driving import FORWARD, Driven, NetworkCall, drive
from lowtide.prediction.repeated_modules import Repeats
from lowtide.quiet import quiet
from lowtide.weights.fill import dtype_name
from lowtide.weights.slots import slots


def stage_name(network: str, entry: str) -> str:
    """What a stage is called in which a network is called by this entry."""
    return network if entry == FORWARD else f"{network}.{entry}"


@dataclass
class DrivenGuest(MetaSubject):
    """A guest on meta; `known` calls and operators are not looked at again.

    `quantized` networks have so many bytes. Those that are `written` to in a call, or given other weights, stay
    resident like these: what a call writes to a weight at rest would be lost.
    """

    known: Repeats = field(default_factory=Repeats, repr=False)
    quantized: Mapping[str, int] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def workload(self, size: Any, allow: Collection[str] = ()) -> Workload:
        """What this call takes.

        Raises `ValueError` where the pipeline's own code cannot go through it, with the reason that it gives.
        """
        key = "blended_tiling" in allow, size
        with self._lock, quiet(), without_gradients(), without_collecting():
            if key not in self.traced:
                self._trace_anew(key, size, (SLICED, EXACT_ON_DISK, *([BLENDED] if key[0] else [])))
        components, stages = self.traced[key]
        return Workload(components, stages, dtype_name(self.subject.dtype), size.to_dict())

    def _trace(self, size: GuestCall, other_ways: Sequence[str]) -> tuple[dict[str, Component], tuple[Stage, ...]]:
        guest = self.subject
        run = lambda: guest.pipe(**harmless(size.arguments))  # noqa: E731
        networks = guest.modules()
        before = {name: _weights(network) for name, network in networks.items()}
        with torch.random.fork_rng(devices=[]), muted():
            try:
                driven = drive(run, networks, entries=ENTRY_POINTS, device=self.device.type, repeats=self.known)
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(_not_followed(type(guest.pipe).__name__, error)) from error
        if not driven.calls:
            raise ValueError(f"A call of {type(guest.pipe).__name__} with {size} calls none of its networks.")
        stages = tuple(self._stages(driven, tuple(other_ways)))
        components = {name: self._component(name, _traced(name, driven)) for name in networks}
        self.written |= {name for name, network in networks.items() if not _are_untouched(network, before[name])}
        bytes_of = {name: components[name].nbytes for name in self.written} | dict(self.quantized)
        staying = {name: that_stays(components[name], nbytes) for name, nbytes in bytes_of.items()}
        return components | staying, stages

    def _stages(self, driven: Driven, other_ways: tuple[str, ...]) -> Iterator[Stage]:
        visits = [key for key, _ in groupby(driven.calls, key=_key)]
        for place, key in enumerate(dict.fromkeys(visits)):
            calls = [call for call in driven.calls if _key(call) == key]
            first = driven.before if place == 0 else 0
            whole = _together(calls, first)
            name = stage_name(*key)
            ways = {WHOLE: whole} | self._other_ways(name, calls, whole, other_ways)
            yield Stage(name, key[0], len(calls), ways, visits=visits.count(key))

    def _other_ways(self, name: str, calls: list[NetworkCall], whole: Call, names: tuple[str, ...]) -> dict[str, Call]:
        ways = self.subject.ways().get(name)
        if ways is None:
            return {}
        called = calls[0]
        assert called.inputs is not None
        args, kwargs = called.inputs
        inputs = tuple(value for value in args if isinstance(value, torch.Tensor))
        network = self.subject.modules()[called.network]
        beside = called.before - sum(x.numel() * x.itemsize for x in inputs)
        after = max(call.after for call in calls)

        def again() -> Call:
            run = lambda: getattr(network, called.entry)(*args, **kwargs)  # noqa: E731
            call = trace(run, [network], inputs, device=self.device.type).call
            return replace(call, peak=max(after, call.peak + beside))

        return dict(ways.traced(names, inputs, again, whole.work))


def _weights(network: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """The weights of a network, and how often each was written to."""
    return [(x := slot.tensor, 0 if x.is_inference() else x._version) for slot in slots(network)]


def _are_untouched(network: nn.Module, before: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether a network has the same weights as before, and none of them was written to."""
    now = _weights(network)
    return len(now) == len(before) and all(
        x is y and written == earlier for (x, written), (y, earlier) in zip(now, before, strict=True)
    )


def _not_followed(pipeline: str, error: Exception) -> str:
    said = str(error).partition("\n")[0][:200].rstrip(".")
    return (
        f"What this call of {pipeline} takes cannot be predicted: its code does not run without numbers ({said}). Its "
        "networks can be given rules one by one: lowtide.apply_residency(pipe.transformer, resident_bytes=0)."
    )


def _key(call: NetworkCall) -> tuple[str, str]:
    return call.network, call.entry


def _together(calls: list[NetworkCall], first: int) -> Call:
    """One call that stands for several: it takes what the largest does, and computes what they do on average."""
    largest = max(calls, key=lambda call: call.call.peak)
    outside = max(first, *(call.after for call in calls))
    workspace = largest.call.workspace if largest.call.peak >= outside else 0
    work = sum((call.call.work for call in calls), Work()).times(1 / len(calls))
    result = max(call.call.result for call in calls)
    return Call(max(largest.call.peak, outside), workspace, result, work, largest.call.stored, spare=largest.call.spare)


def _traced(network: str, driven: Driven) -> Traced:
    """What is known of a network's calls: the order of its parts, and what each computes."""
    calls = [call for call in driven.calls if call.network == network]
    segments = tuple(segment for call in calls for segment in call.segments)
    return Traced(calls[0].call if calls else Call(0, 0, 0, Work()), segments)
