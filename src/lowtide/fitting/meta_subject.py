"""What a run takes, traced on a copy of the subject whose weights are on meta: nothing is read or computed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowtide.activations.row_streaming import RowStreaming
from lowtide.fitting.subject import Size, StagedSubject, Subject, TracedStage
from lowtide.forks import new_lock
from lowtide.loading.blueprint import InFiles
from lowtide.machine.heap import without_collecting
from lowtide.memory.overrides import is_override
from lowtide.ops.modes import without_gradients
from lowtide.planning.workload import BLENDED, EXACT_ON_DISK, SLICED, WHOLE, Call, Component, Stage, Workload
from lowtide.prediction.component import Traced, component, trace
from lowtide.prediction.meta_copy import weights_in_files
from lowtide.quiet import quiet
from lowtide.weights.fill import dtype_name
from lowtide.weights.slots import slots

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
"""Types of the attributes of modules on which a trace may depend."""

Traces = dict[tuple[bool, Size], tuple[dict[str, Component], tuple[Stage, ...]]]
"""Components and stages by what they were traced for: whether with blended tiles, and the size."""


@dataclass(frozen=True)
class Original:
    """What a trace depends on: networks and scheduler, which it does not keep alive, and all that is set on them."""

    parts: Mapping[str, weakref.ref[Any]]
    dtype: torch.dtype
    settings: Mapping[tuple[str, int, str], Any]
    """By the network, the number of the module in it, and the name."""
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, subject: Subject) -> Original:
        """That of a subject as it is now."""
        networks = subject.modules()
        parts = {**networks, **({} if subject.scheduler is None else {"scheduler": subject.scheduler})}
        references = {name: weakref.ref(part) for name, part in parts.items()}
        planned = {name for ways in subject.ways().values() for name in ways.settings}
        settings = {
            (part, number, name): value
            for part, network in networks.items()
            for number, module in enumerate(network.modules())
            for name, value in _settings(module)
            if name not in planned
        }
        strides = (slot.tensor.stride() for network in networks.values() for slot in slots(network))
        return cls(references, subject.dtype, settings, tuple(strides))

    def set_otherwise(self, other: Original) -> set[str]:
        """The names of settings that differ."""
        both = {**self.settings, **other.settings}
        absent = object()
        return {entry[-1] for entry in both if self.settings.get(entry, absent) != other.settings.get(entry, absent)}


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers, names and configurations that a module holds, also in lists; of other objects the type.

    Such as those that compute the attention of modules. How an autoencoder decodes is the plan's to set.
    """
    for name, held in list(module.__dict__.items()):  # another thread's call may set something now
        value = tuple(held) if type(held) is list else held  # a list may be changed where it is
        is_plain = _is_plain(value)
        is_ours = is_override(value) or isinstance(value, RowStreaming)
        if (is_plain or not name.startswith("_")) and not is_ours:
            yield name, value if is_plain else type(value)


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN or _is_frozen(value)


def _is_frozen(value: object) -> bool:
    return dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]


@dataclass
class MetaSubject:
    """A subject on meta, how its networks' weights lie in files by name, and what was traced on it so far."""

    subject: Any
    in_files: InFiles
    device: torch.device
    original: Original | None = None
    traced: Traces = field(default_factory=dict)
    _lock: Any = field(default_factory=new_lock, repr=False)
    _is_being_traced: bool = False

    def is_of(self, subject: Subject) -> bool:
        """Whether this stands for the networks that a subject has now, as they are set now.

        But for what networks set themselves in a call, as they have done here while they were traced.
        """
        if self.original is None:
            return False
        now = Original.of(subject)
        if now == self.original:
            return True
        if replace(now, settings=self.original.settings) != self.original:
            return False
        return self.original.set_otherwise(now) <= self._set_by_calls()

    def _set_by_calls(self) -> set[str]:
        assert self.original is not None
        return self.original.set_otherwise(Original.of(self.subject))

    def adopt(self, subject: Subject) -> None:
        """Stand for a subject that was loaded as this was made."""
        self.original = Original.of(subject)

    def workload(self, size: Any, allow: Collection[str] = ()) -> Workload:
        """What a run of this size takes. Raises `ValueError` for a size that the subject cannot make.

        Blended tiles of clips, which take long to trace, are looked at where `allow` has them.
        """
        blended = size.frames is None or "blended_tiling" in allow
        key = blended, replace(size, steps=1)
        with self._lock, quiet(), without_gradients(), without_collecting():
            if key not in self.traced:
                self._trace_anew(key, size, (SLICED, EXACT_ON_DISK, *([BLENDED] if blended else [])))
            components, traced = self.traced[key]
            calls = self.subject.calls_in_steps(size.steps)
        stages = tuple(replace(stage, calls=calls.get(stage.name, stage.calls)) for stage in traced)
        return Workload(components, stages, dtype_name(self.subject.dtype), size.to_dict())

    def _trace_anew(self, key: tuple[bool, Size], size: Any, other_ways: Sequence[str]) -> None:
        if self._is_being_traced:  # an interrupt, or a fork, came into the end of a trace, which changes the subject
            self.subject = self.subject.with_networks_on_meta()
        self._is_being_traced = True
        try:
            self.traced[key] = self._trace(size, other_ways)
        except Exception:
            self._is_being_traced = False
            raise
        self._is_being_traced = False

    def _trace(self, size: Any, other_ways: Sequence[str]) -> tuple[dict[str, Component], tuple[Stage, ...]]:
        components: dict[str, Component] = {}
        stages: list[Stage] = []
        for stage in self.subject.traced_stages(size):
            whole = self._whole(stage)
            calls: dict[str, Call] = {WHOLE: whole.call}
            if stage.ways is not None:
                again = lambda stage=stage: self._call(stage).call  # noqa: E731
                calls |= stage.ways.traced(other_ways, stage.inputs, again, whole.call.work)
            finished = {way: _finished(call, stage) for way, call in calls.items()}
            stages.append(Stage(stage.name, stage.component, stage.calls, finished, stage.carried))
            if stage.component not in components:
                components[stage.component] = self._component(stage.component, whole)
        return components, tuple(stages)

    def _whole(self, stage: TracedStage) -> Traced:
        try:
            return self._call(stage)
        except RuntimeError as error:
            said = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                f"The {stage.component} cannot do what stage {stage.name!r} asks of it ({said}). Do its configuration "
                "and the others' belong together?"
            ) from error

    def _call(self, stage: TracedStage) -> Traced:
        networks = self.subject.modules().values()
        return trace(stage.run, networks, stage.inputs, device=self.device.type)

    def _component(self, name: str, traced: Traced) -> Component:
        module, in_file = self.subject.modules()[name], self.in_files.get(name)
        is_in_file = in_file is None or all(slot.name in in_file for slot in slots(module) if slot.kind == "parameter")
        return component(name, module, device=self.device.type, lying=in_file, traced=traced, in_file=is_in_file)


def _finished(call: Call, stage: TracedStage) -> Call:
    return replace(call, peak=max(call.peak, stage.tail), work=call.work.times(stage.parts))


def meta_subject(subject: StagedSubject, device: torch.device) -> MetaSubject:
    """A subject, which may be in memory or at rest, made ready to be traced."""
    files: InFiles = {name: weights_in_files(module) for name, module in subject.modules().items()}
    return MetaSubject(subject.with_networks_on_meta(), files, device, Original.of(subject))


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
