"""What a component takes, found on meta tensors before anything is loaded: its calls and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.casting.cast_module import meant_by
from lowtide.casting.casting import INT4, NAMED_CASTINGS, Casting
from lowtide.casting.lazily_packed import can_pack
from lowtide.memory.blocks import Part, split, with_atomic
from lowtide.memory.bounds import aligned
from lowtide.memory.module_weights import gather
from lowtide.memory.rule import Level, Rule
from lowtide.memory.unit import read_by_rows
from lowtide.memory.weight import Weight
from lowtide.planning.workload import Call, Component, UnitSize, Work
from lowtide.prediction.tracing import Traced, trace
from lowtide.weights.files import InFile
from lowtide.weights.slots import slots

__all__ = ["Traced", "component", "trace", "trace_call"]


def trace_call(
    fn: Callable[[], Any],
    networks: Iterable[nn.Module],
    inputs: Iterable[torch.Tensor] = (),
    *,
    device: str = "cpu",
) -> Call:
    """What one call of `fn` takes on a `device` of this type ("cpu" or "cuda"), its modules and `inputs` on meta.

    See `trace` for `networks`; `inputs` are alive from beginning to end. Raises what `fn` raises: code that looks at
    values does not run on meta.
    """
    return trace(fn, networks, inputs, device=device).call


def component(
    name: str,
    module: nn.Module,
    *,
    device: str = "cpu",
    lying: Mapping[str, InFile] | None = None,
    traced: Traced | None = None,
    never_cast: Sequence[str] = (),
    in_file: bool = True,
) -> Component:
    """The weights of a module (on meta, in the dtypes it computes in) as the units of each level.

    `lying` tells how they lie in files, by their names; those it does not name lie as they work. With the
    `traced` call units are in the order of their calls and have their work. Modules whose names match a pattern of
    `never_cast` are not cast, besides those that never are. Raises `ValueError` for what cannot be moved as bytes.
    """
    survey = _Survey(module, device, lying or {}, traced)
    castings = _Castings(survey, tuple(never_cast) or tuple(getattr(module, "never_cast", ())))
    in_few_bits = any(entry.small is not None for entry in survey.lying.values())
    return Component(name, survey.levels(None), castings, in_file, in_few_bits=in_few_bits)


class _Castings(Mapping[str, Mapping[Level, tuple[UnitSize, ...]]]):
    """The units under each casting by its name, made as they are asked for: most plans have none."""

    def __init__(self, survey: _Survey, patterns: tuple[str, ...]) -> None:
        self._survey = survey
        self._patterns = patterns
        self._known: dict[str, Mapping[Level, tuple[UnitSize, ...]]] = {}

    def __getitem__(self, name: str) -> Mapping[Level, tuple[UnitSize, ...]]:
        if name not in self._known:
            self._known[name] = self._survey.levels(NAMED_CASTINGS[name].sparing(self._patterns))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMED_CASTINGS)

    def __len__(self) -> int:
        return len(NAMED_CASTINGS)


class _Survey:
    """What is known of a module's weights."""

    def __init__(
        self,
        module: nn.Module,
        device: str,
        lying: Mapping[str, InFile],
        traced: Traced | None,
    ) -> None:
        self.module = module
        self.device = device
        self.lying = lying
        self.traced = traced
        self.called = {id(called) for called in traced.order} if traced is not None else set()
        self.weights = gather(slots(module))
        self.homes = {id(inner): id(atomic or inner) for inner, atomic in with_atomic(module, None)}

    def levels(self, casting: Casting | None) -> dict[Level, tuple[UnitSize, ...]]:
        """The units of every level."""
        return {level: self.units(level, casting) for level in Level}

    def units(self, level: Level, casting: Casting | None) -> tuple[UnitSize, ...]:
        """The units of a level, in the order in which they are called."""
        parts = split(self.module, self.weights, Rule(level))
        meant = self._cast(casting) if casting is not None and casting.loses else set[int]()
        works = _works(parts, self.traced, self.module)
        ordered = sorted(enumerate(parts), key=lambda entry: works[id(entry[1])][0])
        units = (
            replace(self._unit(part, meant, casting, works[id(part)][1]), registered=place) for place, part in ordered
        )
        return (*units, *self._scales(meant, casting))

    def _cast(self, casting: Casting) -> set[int]:
        return {id(weight) for weight in meant_by(casting, self.module, self.weights)}

    def _unit(self, part: Part, meant: set[int], casting: Casting | None, work: Work) -> UnitSize:
        small = self._small(part, meant, casting)
        resting = sum(small.get(id(weight), self._resting(weight)) for weight in part.weights)
        sizes = {id(weight): aligned(small.get(id(weight), weight.nbytes)) for weight in part.weights}
        return UnitSize(
            f"{type(self.module).__name__}.{part.weights[0].name}",
            sum(sizes.values()),
            resting,
            sum(sizes[id(weight)] for weight in part.weights if self._is_copied(weight, part, casting)),
            len(part.modules),
            part.aside,
            work,
            self._largest_leaf(part, casting),
            self._is_called(part),
            read_by_rows(part.modules),
        )

    def _small(self, part: Part, meant: set[int], casting: Casting | None) -> dict[int, int]:
        """Bytes of the weights that rest in few bits: by a casting, or because they lie so in their file."""
        lying = {
            id(weight): self._in_file(weight) for weight in part.weights if weight.views[0].dtype.is_floating_point
        }
        small = {key: entry.small for key, entry in lying.items() if entry is not None and entry.small is not None}
        if casting is not None:
            cast = (weight for weight in part.weights if id(weight) in meant and id(weight) not in small)
            small |= {id(weight): casting.nbytes(weight.views[0].shape) for weight in cast}
        return small

    def _is_copied(self, weight: Weight, part: Part, casting: Casting | None) -> bool:
        """Whether a weight takes memory beside the file, even on a CPU: what is packed does so once it is called."""
        if casting is not None and (casting.loses or self._is_called(part)):
            return True
        entry = self._in_file(weight)
        return not self._works_in_place(weight) and (entry is None or entry.small is None)

    def _is_called(self, part: Part) -> bool:
        owners = (view.slot.owner for weight in part.weights for view in weight.views)
        return self.traced is None or any(id(module) in self.called for module in (*part.modules, *owners))

    def _scales(self, meant: set[int], casting: Casting | None) -> list[UnitSize]:
        """The scales of channels stay on the device whatever the weights do."""
        if casting is None or not casting.scaled or not meant:
            return []
        shapes = [weight.views[0].shape for weight in self.weights if id(weight) in meant]
        nbytes = sum(4 * shape[0] for shape in shapes if casting.storage_of(shape) != INT4)
        return [UnitSize(f"{type(self.module).__name__}: scales", nbytes, 0, nbytes, aside=True)]

    def _largest_leaf(self, part: Part, casting: Casting | None) -> int:
        """Bytes of one layer's dequantized weights; of those that it multiplies by as they are, for packing them."""
        as_they_are = casting is not None and casting.int8_matmul
        sums: dict[int, int] = {}
        for weight in part.weights:
            home = self.homes[id(weight.views[0].slot.owner)]
            numbers = weight.nbytes // weight.views[0].dtype.itemsize
            sums[home] = sums.get(home, 0) + aligned(numbers if as_they_are and can_pack(weight) else weight.nbytes)
        return max(sums.values(), default=0)

    def _resting(self, weight: Weight) -> int:
        own, entry = weight.views[0].dtype, self._in_file(weight)
        return weight.nbytes // own.itemsize * (own if entry is None else entry.dtype).itemsize

    def _works_in_place(self, weight: Weight) -> bool:
        view, entry = weight.views[0], self._in_file(weight)
        return entry is None or entry.works_as(view.dtype, view.shape, view.stride)

    def _in_file(self, weight: Weight) -> InFile | None:
        """How a weight lies in the file; None where it is as it works, or in none."""
        names = (view.slot.name for view in weight.views)
        return next((self.lying[name] for name in names if name in self.lying), None)


def _works(parts: list[Part], traced: Traced | None, root: nn.Module) -> dict[int, tuple[int, Work]]:
    """For each part the place of its first call, and the work done in it: what is in none belongs to the last one."""
    shares: dict[int, tuple[int, list[Work]]] = {
        id(part): (len(traced.segments) if traced else 0, []) for part in parts
    }
    homes = {id(module): part for part in reversed(parts) for module in part.modules}
    last = next((part for part in parts), None)
    for place, segment in enumerate(traced.segments if traced is not None else ()):
        inner = next((homes[id(outer)] for outer in reversed(segment.inside) if id(outer) in homes), last)
        if inner is not None:
            first, works = shares[id(inner)]
            shares[id(inner)] = (min(first, place), [*works, segment.work])
            last = inner
    return {key: (first, sum(works, Work())) for key, (first, works) in shares.items()}
