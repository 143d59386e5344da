"""A whole pipeline, or one component, in one file of weights: which configurations it needs, and how it is opened."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowtide.configs import CheckpointError
from lowtide.guests.library import diffusers
from lowtide.hub import Source, local_path
from lowtide.loading.elsewhere import check_suffix, open_weights
from lowtide.loading.model_index import MODEL_INDEX
from lowtide.weights.gguf import GgufIndex
from lowtide.weights.index import CheckpointIndex

NOT_IN_FILES = ("safety_checker",)
"""Components that nobody expects in one file: they are left out, as diffusers leaves them out."""
_SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale")


def file_of(model: str | os.PathLike[str]) -> Path | None:
    """The file of a whole pipeline that a name stands for; None for folders and Hub ids.

    Raises `ValueError` for a GGUF file, which holds one component, and `UnsafeWeightsError` for pickled ones.
    """
    file = local_path(model)
    if not file.is_file():
        return None
    if file.suffix.lower() == ".gguf":
        raise ValueError(
            f"{file}: a GGUF file holds one component. Give the folder or Hub id of the pipeline, and the file for the "
            "component: lowtide.load(model, transformer='FILE.gguf')."
        )
    check_suffix(file)
    return file


def opened(file: str | os.PathLike[str]) -> CheckpointIndex:
    """The weights in a file by the names that they have there, its header read.

    Raises `FileNotFoundError`, `UnsafeWeightsError` for pickled files, and `CheckpointError` for malformed ones and
    those that diffusers would not read rightly.
    """
    index = open_weights(file)
    if isinstance(index, GgufIndex):
        return index
    scaled = next((name for name in index if name.endswith(_SCALES) or name == "scaled_fp8"), None)
    if scaled is not None:
        raise CheckpointError(
            f"{index.files[0]}: its {scaled} is a scale of weights in 8 bits, which diffusers reads with a "
            "quantization_config alone. Load the component with diffusers and give it, or take a file without scales."
        )
    return index


def configurations(source: Source, index: CheckpointIndex, config: str | os.PathLike[str] | None) -> Source:
    """Where the configurations of a file's pipeline are: as given, or on the Hub, where diffusers finds them.

    Raises `CheckpointError` for a file of no kind that diffusers knows, and `FileNotFoundError`, which says what to
    give, where they cannot be fetched.
    """
    if config is not None:
        return replace(source, name=os.fspath(config))
    file = index.files[0]
    published = replace(source, name=_published(index), revision=None)
    try:
        published.fetch([MODEL_INDEX])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file} holds weights alone. It looks like {published.name}, whose configurations could not be fetched: "
            f"give config= (--config), a folder or Hub id with its {MODEL_INDEX} and configurations. ({error})"
        ) from error
    return published


def _published(index: CheckpointIndex) -> str:
    """The Hub id of the pipeline that weights look like."""
    diffusers(f"{index.files[0].name}")
    utils = importlib.import_module("diffusers.loaders.single_file_utils")
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in index.items()}
    names: Mapping[str, Any] = utils.CHECKPOINT_KEY_NAMES
    if utils.infer_diffusers_model_type(tensors) == "v1" and names["v1"] not in tensors:  # its answer to all else
        raise CheckpointError(
            f"{index.files[0]}: its weights are of no pipeline that diffusers knows. Give config= (--config), a "
            f"folder or Hub id with the {MODEL_INDEX} and the configurations that belong to it."
        )
    return utils.fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
