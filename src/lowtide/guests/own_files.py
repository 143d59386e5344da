"""The files that a guest's networks were loaded from by their own library, so that weights can rest there.

A network says where it came from; that its weights are those of the files is looked at before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.guests.published_names import NamesError, by_own_names, variants_of, weights_in
from lowtide.weights.files import Origin, WeightFile, pieces
from lowtide.weights.index import CheckpointError, TensorEntry
from lowtide.weights.provenance import noted_origin, remember_origin
from lowtide.weights.slots import slots

SAMPLE = 4096
"""Bytes of each weight that are compared here; all of them are before a weight is left to its file."""


def remember_files(networks: Iterable[nn.Module]) -> None:
    """Note for the weights of networks which bytes of which files they are, where that can be found.

    A network that joins several came from no file itself, but they did.
    """
    for network in networks:
        for owner in (network,) if _folder_of(network) is not None else network.modules():
            folder = _folder_of(owner)
            if folder is not None:
                _remember(owner, folder)


def _folder_of(network: Any) -> Path | None:
    config = getattr(network, "config", None)
    named = getattr(config, "_name_or_path", None) or getattr(network, "name_or_path", None)
    if not isinstance(named, str) or not named or not Path(named).is_dir():
        return None
    return Path(named)


def _remember(network: nn.Module, folder: Path) -> None:
    weights = [slot for slot in slots(network) if slot.kind == "parameter" and _is_of_nowhere(slot.tensor)]
    for variant in (None, *sorted(variants_of(folder))):
        try:
            index = by_own_names(network, weights_in(folder, variant))
        except (NamesError, CheckpointError, OSError):
            continue
        files: dict[Path, WeightFile] = {}
        for slot in weights:
            entry = index.get(slot.name)
            if entry is not None and _is_of_nowhere(slot.tensor):
                origin = Origin(_opened(files, entry.file), entry.offset, entry.nbytes, entry.dtype)
                if _begins_alike(slot.tensor, entry, origin):
                    remember_origin(slot.tensor, origin)


def _is_of_nowhere(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
    return is_plain and noted_origin(tensor) is None


def _opened(files: dict[Path, WeightFile], path: Path) -> WeightFile:
    if path not in files:
        files[path] = WeightFile(path)
    return files[path]


def _begins_alike(tensor: torch.Tensor, entry: TensorEntry, origin: Origin) -> bool:
    if tuple(tensor.shape) != entry.shape or not tensor.is_contiguous():
        return False
    size = min(SAMPLE, entry.nbytes) // entry.dtype.itemsize * entry.dtype.itemsize
    begin = next(iter(pieces(Origin(origin.file, origin.offset, size, origin.dtype))))
    own = tensor.detach().reshape(-1)[: begin.numel()].cpu()
    return torch.equal(own.view(torch.uint8), begin.to(tensor.dtype).view(torch.uint8))
