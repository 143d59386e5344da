"""A guest's checkpoint: its components without weights, the plan for them, and how each is filled under it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.fitting.applied_plan import put_under_plan
from lowtide.fitting.prepare import Fit, prepare
from lowtide.guests.empty_networks import dtype_in_configs, empty_network, is_quantized
from lowtide.guests.guest import Guest
from lowtide.guests.library import component_class, pipeline_class
from lowtide.guests.published_names import NamesError, by_own_names, weights_in
from lowtide.guests.within_budget import guest_to_be, put_within
from lowtide.hub import Source
from lowtide.loading.blueprint import InFiles
from lowtide.loading.model_index import MODEL_INDEX, ComponentSpec, component_folder, read_model_index
from lowtide.machine.heap import trim_heap
from lowtide.memory.presets import stream_for
from lowtide.models.foreign import reading
from lowtide.models.put_weights import Offload, put_weights
from lowtide.models.vocabulary import check_vocabulary
from lowtide.planning.plan import Budgets, Plan
from lowtide.quiet import quiet
from lowtide.weights.files import InFile
from lowtide.weights.index import CheckpointIndex, TensorEntry
from lowtide.weights.slots import slots

SMALL_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
"""Files of a checkpoint that say what its components are like, and vocabularies."""
LARGEST_VOCABULARY = 64_000_000
"""Bytes of the largest file of a tokenizer that is read; Gemma's has 34 million."""


@dataclass(frozen=True)
class Part:
    """One component: as it is if it is no network, else a network without weights, and where these are.

    `index` is None for what its own library loads, with `reason` saying why, and for weights that are not here, as in
    a folder of configurations; `keep` are patterns of the names of weights that stay float32.
    """

    built: Any
    index: CheckpointIndex | None = None
    keep: tuple[str, ...] = ()
    reason: str = ""
    is_here: bool = True

    @property
    def computed(self) -> list[str]:
        """Names of buffers that the files could hold and do not: they are as the class computes them."""
        held = () if self.index is None else self.index
        return [slot.name for slot in slots(self.built) if slot.kind == "buffer" and slot.name not in held]


@dataclass(frozen=True)
class GuestCheckpoint:
    """A checkpoint of a guest that is not loaded yet: the class of its pipeline, its components, and a call."""

    source: Source
    pipeline_class: type[Any]
    folder: Path
    specs: Mapping[str, ComponentSpec | None]
    given: Mapping[str, Any]
    call: Mapping[str, Any]
    dtype: torch.dtype | None
    variant: str | None

    @classmethod
    def opened(
        cls,
        source: Source,
        arguments: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> GuestCheckpoint:
        """A checkpoint, its index read: nothing of it is built. Raises as `lowtide.guests.load_any.load` does.

        `arguments` are components to take in place of its own, and arguments of the call that is planned for.
        """
        class_name, specs, settings = read_model_index(source.fetch([MODEL_INDEX]))
        own_class = pipeline_class(class_name)
        names = set(inspect.signature(own_class.__init__).parameters) - {"self"}
        parts = names | set(specs)
        given = {name: value for name, value in {**settings, **arguments}.items() if name in names}
        call = {name: value for name, value in arguments.items() if name not in parts}
        to_load = {name: spec for name, spec in specs.items() if name in names and name not in given}
        return cls(source, own_class, source.fetch(SMALL_FILES), to_load, given, call, dtype, variant)

    def parts(self, *, may_lack_weights: bool = False) -> dict[str, Part]:
        """The components, networks without weights. First of all raises `CheckpointError` for classes of no library.

        Where they `may_lack_weights`, no file of weights is fetched. Those that are not here are taken to be in the
        dtype that is asked for, or that configurations name, or in float32. Raises `FileNotFoundError` for a variant
        that no component has.
        """
        index = self.folder / MODEL_INDEX
        classes = {name: component_class(index, spec) for name, spec in self.specs.items() if spec is not None}
        parts = {
            name: self._part(name, classes[name], may_lack_weights) if name in classes else Part(None)
            for name in self.specs
        }
        self._check_variant()
        return parts

    def _check_variant(self) -> None:
        files = [file for name in self.specs for file in (self.folder / name).glob("*.safetensors*")]
        variants = {file.name.split(".")[1] for file in files if file.name.count(".") > 1} - {"safetensors"}
        if files and self.variant is not None and self.variant not in variants:
            raise FileNotFoundError(
                f"{self.source.name} has no weights of variant {self.variant!r}; it has the plain ones"
                f"{' and ' * bool(variants)}{', '.join(sorted(variants))}."
            )

    def _part(self, name: str, own_class: type[Any], may_lack_weights: bool) -> Part:
        folder = component_folder(self.folder, name)
        if not issubclass(own_class, nn.Module):
            check_vocabulary(folder, LARGEST_VOCABULARY)
            with quiet(), reading(folder, own_class.__name__):
                return Part(own_class.from_pretrained(folder))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json, of which its {own_class.__name__} would be built.")
        if may_lack_weights and not any(folder.glob("*.safetensors*")):
            dtype = self.dtype or dtype_in_configs(self.folder, (name, *self.specs))
            network = empty_network(own_class, folder, dtype)
            return Part(_in_dtypes(network, {}, None, _kept_in_float32(network, dtype)), is_here=False)
        index = weights_in(self._with_weights(name), self.variant)
        dtype = self.dtype or _floating(index)
        network = empty_network(own_class, folder, dtype)
        keep = _kept_in_float32(network, dtype)
        if is_quantized(folder):
            return Part(network, reason="its weights are in a quantized form of its library's own")
        try:
            own = by_own_names(network, index)
        except NamesError as error:
            return Part(network, reason=str(error))
        return Part(_in_dtypes(network, own, self.dtype, keep), own, keep)

    def _with_weights(self, name: str) -> Path:
        """The folder of a component. From the Hub its weights come with it, since their headers tell their dtypes."""
        folder = self.source.fetch([f"{name}/*.safetensors", f"{name}/*.safetensors.index*.json"])
        return folder / name

    def prepared(
        self, parts: Mapping[str, Part], budgets: Budgets, allow: tuple[str, ...], device: torch.device
    ) -> Fit:
        """All that plans are made from; no weight is read."""
        built = {name: part.built for name, part in parts.items()}
        with quiet():
            guest = Guest(self.pipeline_class(**self.given, **built))
        in_files: InFiles = {name: _in_files(part) for name, part in parts.items() if part.index is not None}
        in_files |= {name: None for name, part in parts.items() if not part.is_here}
        meta = guest.on_meta(device, in_files)
        loaded = {name: part for name, part in self.given.items() if isinstance(part, nn.Module)}
        return prepare(meta, budgets, guest.usual_size(**self.call), allow=allow, loaded=loaded)

    def load(self, budgets: Budgets, allow: tuple[str, ...], device: torch.device) -> Any:
        """The pipeline within the budgets."""
        parts = self.parts()
        fit = self.prepared(parts, budgets, allow, device)
        plan = fit.choose()
        built = {name: self._filled(name, part, plan, device) for name, part in parts.items()}
        with quiet():
            guest = guest_to_be(self.pipeline_class(**self.given, **built))
        fit.meta.adopt(guest)
        put_under_plan(guest, fit, plan, as_planned={name for name, part in parts.items() if part.index is not None})
        put_within(guest)
        trim_heap()
        return guest.pipe

    def unplanned(self, device: torch.device) -> Any:
        """The pipeline without a budget, its weights views of their files: for what changes it before it is planned.

        Weights whose dtype is not the files' are read.
        """
        built = {name: self._filled(name, part, None, device) for name, part in self.parts().items()}
        with quiet():
            return self.pipeline_class(**self.given, **built)

    def _filled(self, name: str, part: Part, plan: Plan | None, device: torch.device) -> Any:
        if not isinstance(part.built, nn.Module):
            return part.built
        if part.index is None:
            return self._by_its_library(name, part)
        planned = None if plan is None else plan.components.get(name)
        rule = None if planned is None else planned.rule
        casting = None if planned is None or planned.casting is None else NAMED_CASTINGS[planned.casting]
        offload = None if rule is None else Offload(rule, stream_for(device, rule))
        put_weights(
            part.built, part.index, dtype=self.dtype, offload=offload, casting=casting, leave=part.computed,
            own_dtypes=dict.fromkeys(part.keep, torch.float32),
        )  # fmt: skip
        return part.built

    def _by_its_library(self, name: str, part: Part) -> nn.Module:
        """A network that its own library loads: all of it is in memory then, before the plan moves it."""
        warnings.warn(
            f"{name} is loaded by its own library, which takes the memory of all its weights: {part.reason}.",
            stacklevel=5,
        )
        folder = self._with_weights(name)
        with quiet():
            return type(part.built).from_pretrained(folder, torch_dtype=self.dtype, variant=self.variant)


def _floating(index: CheckpointIndex) -> torch.dtype:
    dtypes = (entry.dtype for entry in index.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def _kept_in_float32(network: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Patterns of the names of weights that a class keeps in float32 when it is loaded in this dtype."""
    if dtype == torch.float32:
        return ()
    kept = list(getattr(network, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16 or not hasattr(network, "base_model_prefix"):  # diffusers does for all dtypes
        kept += getattr(network, "_keep_in_fp32_modules", None) or []
    return tuple(pattern for name in kept for pattern in (f"{name}.*", f"*.{name}.*", f"*.{name}", name))


def _in_dtypes(
    network: nn.Module, index: Mapping[str, TensorEntry], dtype: torch.dtype | None, keep: tuple[str, ...]
) -> nn.Module:
    """Give a network on meta the dtypes that it is loaded in."""
    made: dict[int, nn.Parameter] = {}
    for slot in slots(network):
        entry = index.get(slot.name)
        if slot.kind != "parameter" or not slot.tensor.is_meta or not slot.tensor.is_floating_point():
            continue
        in_file = slot.tensor.dtype if entry is None else entry.dtype
        chosen = torch.float32 if any(fnmatch(slot.name, pattern) for pattern in keep) else dtype or in_file
        if id(slot.tensor) not in made:
            empty = torch.empty_like(slot.tensor, dtype=chosen)
            made[id(slot.tensor)] = nn.Parameter(empty, requires_grad=False)
        slot.put(made[id(slot.tensor)])
    return network


def _in_files(part: Part) -> Mapping[str, InFile]:
    assert part.index is not None
    return {name: InFile.at(entry.offset, entry.dtype) for name, entry in part.index.items()}
