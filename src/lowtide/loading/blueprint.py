"""Build a checkpoint's components from its configurations alone: networks on meta, in the dtypes they would load in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.casting.cast_files import in_file_of
from lowtide.loading.components import MODELS, LoadOptions, weights_name, without_variant
from lowtide.loading.elsewhere import ByComponent
from lowtide.loading.model_index import ComponentSpec, component_folder
from lowtide.quiet import quiet
from lowtide.schedulers import SCHEDULERS
from lowtide.weights.files import InFile
from lowtide.weights.fill import dtype_by_name, state_names
from lowtide.weights.index import CheckpointIndex, find_weights
from lowtide.weights.names import apply_names
from lowtide.weights.slots import slots

InFiles = dict[str, Mapping[str, InFile] | None]
"""For each network, by name, how its weights lie in files; None where there are no files."""


def components_on_meta(
    folder: Path,
    specs: Mapping[str, ComponentSpec | None],
    options: LoadOptions,
    elsewhere: ByComponent | None = None,
) -> tuple[dict[str, Any], InFiles]:
    """The components of a checkpoint's folder, which need not hold any weights, and how weights lie in its files.

    Networks may be `elsewhere`. They are on meta, schedulers are complete. Tokenizers and image processors are empty
    objects, since tracing does not use them. Raises what loading raises for configurations that are missing or
    malformed, and for such weights.
    """
    parts: dict[str, Any] = {}
    in_files: InFiles = {}
    elsewhere = elsewhere or {}
    plain = without_variant(
        folder, {name: spec for name, spec in specs.items() if name not in elsewhere}, options.variant
    )
    for name, spec in specs.items():
        if spec is None:
            parts[name] = None
            continue
        place = elsewhere.get(name)
        own = component_folder(folder, name) if place is None else place.folder
        variant = None if name in plain else options.variant
        weights = _weights(own, spec.class_name, variant) if place is None else place.weights
        parts[name] = _part(own, spec, weights)
        if isinstance(parts[name], nn.Module):
            in_files[name] = _fit_dtypes(parts[name], weights, spec.class_name, options)
    return parts, in_files


def _part(folder: Path, spec: ComponentSpec, weights: CheckpointIndex | None) -> Any:
    name = spec.class_name
    if name in MODELS:
        return MODELS[name].on_meta(folder, MODELS[name].read_config(folder), weights)
    if name in SCHEDULERS:
        return SCHEDULERS[name].from_pretrained(folder)
    return object()


def _fit_dtypes(
    module: nn.Module, weights: CheckpointIndex | None, class_name: str, options: LoadOptions
) -> Mapping[str, InFile] | None:
    """Give a network on meta the dtypes that it would be loaded in, and return how its weights lie in files."""
    index = None if weights is None else apply_names(weights, MODELS[class_name].names, state_names(module))
    in_file = None if index is None else {name: in_file_of(entry) for name, entry in index.items()}
    dtypes = [] if in_file is None else [weight.dtype for weight in in_file.values()]
    floating = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    dtype = options.dtype or floating or torch.float32
    beside = MODELS[class_name].float32_beside_float16 if dtype == torch.float16 else ()
    own = dict.fromkeys(beside, torch.float32)
    converted: dict[int, torch.Tensor] = {}
    for slot in slots(module):
        if slot.tensor.is_floating_point():
            wanted = dtype_by_name([slot.name], own, dtype)
            if id(slot.tensor) not in converted:
                converted[id(slot.tensor)] = _as(slot.tensor, wanted)
            slot.put(converted[id(slot.tensor)])
    return in_file


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = torch.empty_like(tensor, dtype=dtype)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _weights(folder: Path, class_name: str, variant: str | None) -> CheckpointIndex | None:
    """The index of a network's weights; None where the folder holds none of any kind."""
    if not any(folder.glob("*.safetensors*")):
        return None
    with quiet():
        return find_weights(folder, weights_name(class_name), variant)
