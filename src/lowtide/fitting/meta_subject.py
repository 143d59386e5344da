"""What a run takes, traced on a twin of the pipeline whose weights are on meta: nothing is read or computed."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lowtide.activations.row_streaming import row_streaming_of
from lowtide.fitting.blueprint import InFiles
from lowtide.fitting.decode_modes import can_go, set_way
from lowtide.machine.heap import without_collecting
from lowtide.ops.attention import AttentionBackend
from lowtide.planning.run_size import RunSize
from lowtide.planning.workload import (
    BLENDED,
    EXACT,
    EXACT_ON_DISK,
    SLICED,
    WHOLE,
    Call,
    Component,
    Stage,
    Work,
    Workload,
)
from lowtide.prediction.component import Traced, component, trace
from lowtide.prediction.meta_copy import meta_twin, weights_in_files
from lowtide.quiet import quiet
from lowtide.weights.fill import dtype_name
from lowtide.weights.slots import slots

HISTORY = 8
"""Latents in float32 that a scheduler, guidance and noise have alive at once, at most."""


@dataclass(frozen=True)
class TracedStage:
    """A stage as a pipeline describes it: `run` is one of its `calls`, on meta, with `inputs` alive before.

    `carried` and `tail` are bytes: what is alive all along beside the call, and what the result needs at once on its
    way to what is asked for. A stage that `decodes` can be gone through in several ways, named to `run`. What `run`
    computes is one part in `parts` of the call's work: the rest of it is alike.
    """

    name: str
    component: str
    calls: int
    run: Callable[[str], Any]
    inputs: tuple[torch.Tensor, ...]
    carried: int = 0
    tail: int = 0
    decodes: bool = False
    parts: float = 1.0


@dataclass(frozen=True)
class Original:
    """What a twin depends on: networks and scheduler, which it does not keep alive, and what can be set on them."""

    parts: Mapping[str, weakref.ref[Any]]
    dtype: torch.dtype
    attention: tuple[AttentionBackend | None, ...]
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pipe: Any) -> Original:
        """That of a pipeline as it is now."""
        networks = pipe.modules()
        parts = {name: weakref.ref(part) for name, part in {**networks, "scheduler": pipe.scheduler}.items()}
        attention = (getattr(one, "attention_backend", None) for net in networks.values() for one in net.modules())
        strides = (slot.tensor.stride() for net in networks.values() for slot in slots(net))
        return cls(parts, pipe.dtype, tuple(attention), tuple(strides))


Traces = dict[tuple[bool, RunSize], tuple[dict[str, Component], tuple[Stage, ...]]]
"""Components and stages by what they were traced for: whether with blended tiles, and the size."""


@dataclass
class Twin:
    """A pipeline on meta, how its components' weights lie in files by name, and what was traced on it so far."""

    pipe: Any
    in_files: InFiles
    device: torch.device
    original: Original | None = None
    traced: Traces = field(default_factory=dict)
    _one_at_a_time: Any = field(default_factory=threading.Lock)

    def is_of(self, pipe: Any) -> bool:
        """Whether this is the twin of the components that a pipeline has now, in the dtype that it computes in."""
        return self.original == Original.of(pipe)

    def shares(self, name: str, other: Twin) -> bool:
        """Whether a component is the same one in another twin."""
        mine, others = (None if one.original is None else one.original.parts.get(name) for one in (self, other))
        return mine is not None and mine == others

    def adopt(self, pipe: Any) -> None:
        """Stand for a pipeline that was loaded as the twin was made."""
        self.original = Original.of(pipe)

    def workload(self, size: RunSize, allow: Collection[str] = ()) -> Workload:
        """What a run of this size takes. Raises `ValueError` for a size that the pipeline cannot make.

        Blended tiles of clips, which take long to trace, are looked at where `allow` has them.
        """
        blended = size.frames is None or "blended_tiling" in allow
        key = blended, replace(size, steps=1)
        with self._one_at_a_time, quiet(), torch.no_grad(), without_collecting():
            if key not in self.traced:
                self.traced[key] = self._trace(size, (SLICED, EXACT_ON_DISK, *([BLENDED] if blended else [])))
            components, traced = self.traced[key]
            calls = self.pipe.scheduler.calls(size.steps)
        stages = tuple(replace(one, calls=calls) if one.name == "denoise" else one for one in traced)
        return Workload(components, stages, dtype_name(self.pipe.dtype), size.to_dict())

    def _trace(self, size: RunSize, other_ways: Sequence[str]) -> tuple[dict[str, Component], tuple[Stage, ...]]:
        components: dict[str, Component] = {}
        stages: list[Stage] = []
        for one in self.pipe.traced_stages(size):
            try:
                whole = self._traced_call(one, WHOLE)
            except RuntimeError as error:
                said = str(error).partition("\n")[0].rstrip(".")
                raise ValueError(
                    f"The {one.component} cannot do what stage {one.name!r} asks of it ({said}). Do its configuration "
                    "and the others' belong together?"
                ) from error
            ways = {WHOLE: _finished(whole.call, one)}
            if one.decodes:
                ways |= self._other_ways(one, other_ways, whole.call.work)
            stages.append(Stage(one.name, one.component, one.calls, ways, one.carried))
            if one.component not in components:
                components[one.component] = self._component(one.component, whole)
        return components, tuple(stages)

    def _traced_call(self, traced: TracedStage, way: str) -> Traced:
        return trace(lambda: traced.run(way), self.pipe.modules().values(), traced.inputs, device=self.device.type)

    def _component(self, name: str, traced: Traced) -> Component:
        module, in_file = getattr(self.pipe, name), self.in_files.get(name)
        is_in_file = in_file is None or all(slot.name in in_file for slot in slots(module) if slot.kind == "parameter")
        return component(name, module, device=self.device.type, lying=in_file, traced=traced, in_file=is_in_file)

    def _other_ways(self, traced: TracedStage, names: Sequence[str], work: Work) -> dict[str, Call]:
        """The ways that an autoencoder offers for this picture or clip."""
        ways: dict[str, Call] = {}
        vae = getattr(self.pipe, traced.component)
        for way in names:
            if not can_go(vae, way, len(traced.inputs[0])):
                continue
            try:
                set_way(vae, way)
                if way != BLENDED or vae.needs_tiles(traced.inputs[0], vae.config.scale):
                    call = self._traced_call(traced, way).call
                    by_rows = _by_rows(call, vae, work) if way == EXACT_ON_DISK else {way: call}
                    ways |= {name: _finished(one, traced) for name, one in by_rows.items()}
            except ValueError:
                continue  # a network that does not go by rows
            finally:
                set_way(vae, WHOLE)
        return ways


def _by_rows(call: Call, vae: Any, work: Work) -> dict[str, Call]:
    """Both ways row by row, of a call that has its rows in a file: the work of the whole one, and moving the rows."""
    streaming = row_streaming_of(vae.decoder)
    assert streaming is not None
    widened = 2.0 if next(vae.parameters()).itemsize == 2 else 0.0  # norms of 16-bit numbers go through 32 bits
    moved = Work(touched=widened * work.touched + 2.0 * call.stored * len(vae.config.block_out_channels))
    on_disk = replace(call, work=work + moved)
    room = streaming.most_room
    in_memory = replace(on_disk, peak=call.peak + room, stored=0, paged=room)
    return {EXACT: in_memory, EXACT_ON_DISK: on_disk}


def _finished(call: Call, traced: TracedStage) -> Call:
    return replace(call, peak=max(call.peak, traced.tail), work=call.work.times(traced.parts))


def twin_of(pipe: Any, device: torch.device, in_files: InFiles | None = None) -> Twin:
    """The twin of a pipeline, which may be in memory, at rest or on meta itself.

    `in_files` tells how weights of components that are on meta lie in files; the others know it.
    """
    twin, known = copy.copy(pipe), dict(in_files or {})
    for name, module in pipe.modules().items():
        setattr(twin, name, meta_twin(module))
        if name not in known:
            known[name] = weights_in_files(module)
    twin.scheduler = StillScheduler(pipe.scheduler)
    if hasattr(twin.vae, "disable_tiling"):
        set_way(twin.vae, WHOLE)
    return Twin(twin, known, device, Original.of(pipe))


class StillScheduler:
    """Stands for a scheduler where nothing is computed: real ones look at numbers."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self.config = scheduler.config

    def scale_model_input(self, sample: torch.Tensor, timestep: object = None) -> torch.Tensor:
        """The sample."""
        return sample

    def calls(self, steps: int) -> int:
        """How often the network is called in so many steps."""
        self._scheduler.set_timesteps(steps)
        return len(self._scheduler.timesteps)


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of tensors together."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
