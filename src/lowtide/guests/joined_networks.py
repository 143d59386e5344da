"""Networks that a library joins of several, each in a folder of its own: `controlnet`, `controlnet_1` and so on.

Such a class has no configuration; it is built of a list of the networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowtide.configs import CheckpointError, read_json
from lowtide.guests.library import component_class
from lowtide.guests.unloaded import Part
from lowtide.loading.model_index import ComponentSpec
from lowtide.quiet import quiet
from lowtide.weights.index import CheckpointIndex, TensorEntry


def is_joined(own_class: type[Any]) -> bool:
    """Whether a class of networks has no configuration of its own, but those of the networks that it joins."""
    return not hasattr(own_class, "config_class") and not hasattr(own_class, "from_config")


def joined_names(folder: Path, name: str) -> list[str]:
    """The names of the folders that a component's networks are in, in their order."""
    names = [name]
    while (folder / f"{name}_{len(names)}").is_dir():
        names.append(f"{name}_{len(names)}")
    return names


def class_in(folder: Path) -> type[Any]:
    """The class that a network's configuration names. Raises `CheckpointError` for one that diffusers does not have."""
    file = folder / "config.json"
    class_name = read_json(file).get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{file} does not name the class of its network.")
    return component_class(file, ComponentSpec(folder.name, "diffusers", class_name))


def joined(own_class: type[Any], parts: Sequence[Part]) -> Part:
    """A component of the networks that it joins, none of which has weights yet.

    It is loaded by its own library where one of them is. Raises `CheckpointError` where they cannot be joined.
    """
    try:
        with quiet():
            network = own_class([part.built for part in parts])
    except Exception as error:  # the class may raise anything
        raise CheckpointError(f"{own_class.__name__} cannot be built of {len(parts)} networks: {error}") from error
    network.eval().requires_grad_(False)
    reason = next((part.reason for part in parts if part.reason), "")
    indices = [part.index for part in parts if part.index is not None]
    if reason or len(indices) < len(parts):
        return Part(network, reason=reason, is_here=all(part.is_here for part in parts))
    paths = [_path_in(network, part.built) for part in parts]
    entries: dict[str, TensorEntry] = {}
    for path, index in zip(paths, indices, strict=True):
        entries |= {f"{path}.{name}": entry for name, entry in index.items()}
    keep = tuple(f"{path}.{pattern}" for path, part in zip(paths, parts, strict=True) for pattern in part.keep)
    files = tuple(file for index in indices for file in index.files)
    return Part(network, CheckpointIndex(entries, files, indices[0].metadata), parts[0].dtype, keep)


def _path_in(network: nn.Module, part: nn.Module) -> str:
    return next(path for path, module in network.named_modules() if module is part)
