"""A guest's checkpoint: its components without weights, the plan for them, and how each is filled under it."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.fitting.applied_plan import put_under_plan
from lowtide.fitting.prepare import Fit, prepare
from lowtide.guests.conversions import NotInFileError, converted
from lowtide.guests.empty_networks import dtype_in_configs, empty_network, is_quantized
from lowtide.guests.guest import Guest
from lowtide.guests.guest_decode import in_tiles_where_it_must
from lowtide.guests.joined_networks import class_in, is_joined, joined, joined_names
from lowtide.guests.library import component_class, pipeline_class
from lowtide.guests.packed_files import packed
from lowtide.guests.published_names import NAMES, NamesError, by_own_names, variants_of, weights_in
from lowtide.guests.single_files import NOT_IN_FILES, configurations, file_of, opened
from lowtide.guests.unloaded import Part, beside_computed, computed_in, floating, in_dtypes, kept_in_float32, lying
from lowtide.guests.within_budget import guest_to_be, put_within
from lowtide.hub import Source, weight_patterns
from lowtide.loading.blueprint import InFiles
from lowtide.loading.model_index import MODEL_INDEX, ComponentSpec, component_folder, read_model_index
from lowtide.machine.heap import trim_heap
from lowtide.memory.presets import stream_for
from lowtide.models.foreign import reading
from lowtide.models.put_weights import Offload, put_weights
from lowtide.models.vocabulary import check_vocabulary
from lowtide.planning.plan import Budgets, Plan
from lowtide.quiet import quiet
from lowtide.weights.gguf import GgufIndex
from lowtide.weights.index import CheckpointError, CheckpointIndex

SMALL_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
"""Files of a checkpoint that say what its components are like, and vocabularies."""
LARGEST_VOCABULARY = 64_000_000
"""Bytes of the largest file of a tokenizer that is read; Gemma's has 34 million."""


@dataclass(frozen=True)
class GuestCheckpoint:
    """A checkpoint of a guest that is not loaded yet: the class of its pipeline, its components, and a call.

    `whole` are the weights of a file that holds several components, `files` those of files for single ones.
    """

    source: Source
    pipeline_class: type[Any]
    folder: Path
    specs: Mapping[str, ComponentSpec | None]
    given: Mapping[str, Any]
    call: Mapping[str, Any]
    dtype: torch.dtype | None
    variant: str | None
    whole: CheckpointIndex | None = None
    files: Mapping[str, CheckpointIndex] = field(default_factory=dict)

    @classmethod
    def opened(
        cls,
        source: Source,
        arguments: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> GuestCheckpoint:
        """A checkpoint, its index read: nothing of it is built. Raises as `lowtide.guests.load_any.load` does.

        `arguments` are components to take in place of its own, or files of their weights, and arguments of the call
        that is planned for. `config` is where the configurations of a file are.
        """
        file = file_of(source.name)
        whole = None if file is None else opened(file)
        if whole is not None:
            source = configurations(source, whole, config)
        class_name, specs, settings = read_model_index(source.fetch([MODEL_INDEX]))
        own_class = pipeline_class(class_name)
        names = set(inspect.signature(own_class.__init__).parameters) - {"self"}
        parts = names | set(specs)
        files = {name: opened(value) for name, value in arguments.items() if is_file_for(specs.get(name), value)}
        given = {name: value for name, value in {**settings, **arguments}.items() if name in names - set(files)}
        if whole is not None:
            given |= {name: None for name in NOT_IN_FILES if specs.get(name) is not None and name not in arguments}
        call = {name: value for name, value in arguments.items() if name not in parts}
        to_load = {name: spec for name, spec in specs.items() if name in names and name not in given}
        folder = source.fetch(SMALL_FILES)
        return cls(source, own_class, folder, to_load, given, call, dtype, variant, whole, files)

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
        folders = [self.folder / name for name in self.specs]
        variants = {variant for folder in folders for variant in variants_of(folder)}
        is_here = any(file for folder in folders for file in folder.glob("*.safetensors"))
        if is_here and self.variant is not None and self.variant not in variants:
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
        if is_joined(own_class):
            names = joined_names(self.folder, name)
            classes = [class_in(component_folder(self.folder, each)) for each in names]
            return joined(own_class, [self._part(*each, may_lack_weights) for each in zip(names, classes, strict=True)])
        part = self._network(name, own_class, folder, may_lack_weights)
        return replace(part, built=in_tiles_where_it_must(part.built))

    def _network(self, name: str, own_class: type[Any], folder: Path, may_lack_weights: bool) -> Part:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json, of which its {own_class.__name__} would be built.")
        index = self.files.get(name, self.whole)
        if index is not None:
            try:
                return self._in_one_file(name, own_class, folder, index)
            except NotInFileError as error:
                if name in self.files:
                    raise CheckpointError(f"{name}: {error}.") from error
                if not may_lack_weights and not any(self._with_weights(name).glob("*.safetensors*")):
                    raise FileNotFoundError(
                        f"{name}: {error}, and {folder} has none either. Give its weights or the network: "
                        f"load(..., {name}=...)."
                    ) from error
        if may_lack_weights and not any(folder.glob("*.safetensors*")):
            dtype = self.dtype or dtype_in_configs(self.folder, (name, *self.specs))
            network = empty_network(own_class, folder, dtype)
            return Part(in_dtypes(network, {}, None, kept_in_float32(network, dtype)), is_here=False)
        index = weights_in(self._with_weights(name), self.variant)
        network, keep = self._empty(own_class, folder, index)
        if is_quantized(folder):
            return Part(network, reason="its weights are in a quantized form of its library's own")
        try:
            own = by_own_names(network, index)
        except NamesError as error:
            return Part(network, reason=str(error))
        dtype = self.dtype or computed_in(own, index)
        return Part(in_dtypes(network, own, dtype, keep), own, dtype, keep)

    def _empty(self, own_class: type[Any], folder: Path, index: CheckpointIndex) -> tuple[Any, tuple[str, ...]]:
        """A network on meta for weights like these, and patterns of the names of those that it keeps in float32."""
        dtype = self.dtype or floating(index)
        network = empty_network(own_class, folder, dtype)
        return network, kept_in_float32(network, dtype)

    def _in_one_file(self, name: str, own_class: type[Any], folder: Path, index: CheckpointIndex) -> Part:
        """A network whose weights are in a file under other names. Raises `NotInFileError` where they are not."""
        file = index.files[0]
        if isinstance(index, GgufIndex):
            dtype = self.dtype or dtype_in_configs(self.folder, self.specs)
            network = empty_network(own_class, folder, dtype)
            try:
                held = packed(network, index, dtype)
            except NamesError as error:
                raise CheckpointError(f"{name}: {file}: {error}. Load the component and pass it in.") from error
            held.put_on_meta(network)
            return Part(network, file=file, packed=held)
        network, keep = self._empty(own_class, folder, index)
        try:
            held = converted(network, index, alone=name in self.files)
        except NamesError as error:
            if not hasattr(own_class, "from_single_file"):
                raise CheckpointError(f"{name}: {file}: {error}. Load the component and pass it in.") from error
            return Part(network, reason=str(error), file=file)
        dtype = self.dtype or computed_in(held.index, index)
        network = in_dtypes(network, held.index, dtype, keep)
        return Part(network, held.index, dtype, keep, file=file, converted=held)

    def _with_weights(self, name: str) -> Path:
        """The folder of a component. From the Hub its weights come with it, since their headers tell their dtypes.

        Those that will be loaded: of the variant, or the plain ones where the component has none of it.
        """
        folder = self._fetched(name, self.variant)
        if self.variant is None or self.variant in variants_of(folder):
            return folder
        return self._fetched(name, None)

    def _fetched(self, name: str, variant: str | None) -> Path:
        patterns = (pattern for base in NAMES for pattern in weight_patterns(base, variant))
        return self.source.fetch(f"{name}/{pattern}" for pattern in patterns) / name

    def prepared(
        self, parts: Mapping[str, Part], budgets: Budgets, allow: tuple[str, ...], device: torch.device
    ) -> Fit:
        """All that plans are made from; no weight is read."""
        built = {name: part.built for name, part in parts.items()}
        with quiet():
            guest = Guest(self.pipeline_class(**self.given, **built))
        in_files: InFiles = {name: lying(part) for name, part in parts.items() if part.index is not None}
        in_files |= {name: None for name, part in parts.items() if not part.is_here}
        meta = guest.on_meta(device, in_files)
        loaded = {name: part for name, part in self.given.items() if isinstance(part, nn.Module)}
        budgets = beside_computed(parts, budgets)
        return prepare(meta, budgets, guest.usual_size(**self.call), allow=allow, loaded=loaded)

    def load(
        self,
        budgets: Budgets,
        allow: tuple[str, ...],
        device: torch.device,
        parts: Mapping[str, Part] | None = None,
    ) -> Any:
        """The pipeline within the budgets; `parts` are its own, if they were made already."""
        parts = parts or self.parts()
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
        if part.packed is not None:
            part.packed.read_into(part.built)
            return part.built
        if part.index is None:
            return self._by_its_library(name, part)
        planned = None if plan is None else plan.components.get(name)
        rule = None if planned is None else planned.rule
        casting = None if planned is None or planned.casting is None else NAMED_CASTINGS[planned.casting]
        offload = None if rule is None else Offload(rule, stream_for(device, rule))
        with nullcontext(part.index) if part.converted is None else part.converted.at_hand() as index:
            put_weights(
                part.built, index, dtype=part.dtype, offload=offload, casting=casting, leave=part.computed,
                own_dtypes=dict.fromkeys(part.keep, torch.float32),
            )  # fmt: skip
        return part.built

    def _by_its_library(self, name: str, part: Part) -> nn.Module:
        """A network that its own library loads: all of it is in memory then, before the plan moves it."""
        warnings.warn(
            f"{name} is loaded by its own library, which takes the memory of all its weights: {part.reason}.",
            stacklevel=5,
        )
        if part.file is not None:
            place = {"config": str(self.folder), "subfolder": name}
            with quiet():
                return type(part.built).from_single_file(str(part.file), torch_dtype=self.dtype, **place)
        folder = self._with_weights(name)
        with quiet():
            network = type(part.built).from_pretrained(folder, torch_dtype=self.dtype, variant=self.variant)
        return in_tiles_where_it_must(network)


def is_file_for(spec: ComponentSpec | None, given: Any) -> bool:
    """Whether what is given for a component is a file of its weights, and not the component."""
    return spec is not None and isinstance(given, (str, os.PathLike))
