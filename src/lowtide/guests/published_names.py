"""The weights of a guest's network by its own names: files may have older ones, which its library knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowtide.weights.fill import state_names
from lowtide.weights.index import CheckpointError, CheckpointIndex, TensorEntry, find_weights, variants_in

NAMES = ("diffusion_pytorch_model", "model")
"""What weights are called, in diffusers and in transformers."""


class NamesError(ValueError):
    """The weights of a file cannot be put into a network one by one."""


def weights_in(folder: Path, variant: str | None) -> CheckpointIndex:
    """The weights of a component, of a variant, or the plain ones without. Raises as `find_weights` does."""
    names = [path.name for path in folder.iterdir()]
    base = next((base for base in NAMES if any(name.startswith(base) for name in names)), NAMES[0])
    return find_weights(folder, base, variant if variant in variants_of(folder) else None)


def variants_of(folder: Path) -> set[str]:
    """The variants of weights that the folder of a component has, without the plain ones."""
    return {variant for base in NAMES for variant in variants_in(folder, base) if variant is not None}


def by_own_names(network: nn.Module, index: CheckpointIndex) -> CheckpointIndex:
    """The weights that a network has, by its own names.

    Raises `CheckpointError` where some are of another shape, and `NamesError` where the library would compute new
    weights of those in the file.
    """
    expected = state_names(network)
    entries = dict(index)
    if not expected <= entries.keys():
        entries = _renamed(network, index)
    own = {name: entry for name, entry in entries.items() if name in expected}
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict(keep_vars=True).items()}
    wrong = [name for name, entry in own.items() if shapes.get(name, entry.shape) != entry.shape]
    if wrong:
        raise CheckpointError(
            f"{index.files[0]}: {wrong[0]} has the shape {list(own[wrong[0]].shape)}, and the configuration of its "
            f"{type(network).__name__} asks for {list(shapes[wrong[0]])}. Check that both belong together."
        )
    return CheckpointIndex(own, index.files, index.metadata)


def _renamed(network: Any, index: CheckpointIndex) -> Mapping[str, TensorEntry]:
    if hasattr(network, "_fix_state_dict_keys_on_load"):  # diffusers
        entries = dict(index)
        return network._fix_state_dict_keys_on_load(entries) or entries
    if not hasattr(network, "base_model_prefix"):
        return index
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return index  # before version 5 there is no such table
    transforms = get_model_conversion_mapping(network)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    own = network.state_dict(keep_vars=True)
    renamed: dict[str, TensorEntry] = {}
    for name, entry in index.items():
        new_name, converted = rename_source_key(name, renamings, converters, network.base_model_prefix, own)
        if converted is not None:
            raise NamesError(f"{name} is one of several that are put together")
        renamed[new_name] = entry
    return renamed
