"""Load a network of ours from a GGUF file: what is in blocks there rests so, in the mapped file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lowtide.configs import Config
from lowtide.models.bounded_build import build_on_meta
from lowtide.models.mixin import ModelMixin
from lowtide.models.put_weights import Offload, put_weights
from lowtide.weights.fill import state_names
from lowtide.weights.gguf import read_gguf_index, resting_index
from lowtide.weights.index import CheckpointIndex
from lowtide.weights.names import NameTable, apply_names

ModelT = TypeVar("ModelT", bound=ModelMixin)


def model_from_gguf(
    kind: type[ModelT],
    file: str | os.PathLike[str],
    config: Config,
    *,
    dtype: torch.dtype = torch.float32,
    offload: Offload | None = None,
    names: NameTable | Callable[[CheckpointIndex], CheckpointIndex] | None = None,
) -> ModelT:
    """A network of class `kind` with the weights of a GGUF file: Q4_0, Q8_0, F16, BF16 or F32, each tensor its own.

    Blocks stay in the mapped file, and are dequantized to `dtype`, in which all compute, around each call. The file's
    names are those of the network's own `state_dict`; `names` is a table of others, or makes an index of the right
    names of the file's. Raises `FileNotFoundError`, `CheckpointError` for a file that is damaged, of other kinds or
    that does not match, and `ValueError` for a configuration that is not supported.
    """
    path = Path(file).expanduser()
    index = resting_index(read_gguf_index(path))
    if callable(names):
        index = names(index)
    model = build_on_meta(lambda: kind(config), path, config.to_dict(), index)
    if isinstance(names, NameTable):
        index = apply_names(index, names, state_names(model))
    put_weights(model, index, dtype=dtype, offload=offload, float32_beside_float16=kind.float32_beside_float16)
    return model.eval()
