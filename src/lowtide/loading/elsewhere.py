"""Networks whose files are not in their checkpoint's folder: where they are, and how they are found there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.configs import CheckpointError
from lowtide.hub import Source, local_path, weight_patterns
from lowtide.loading.original_weights import VAE, held_in, prefix_and_names
from lowtide.models.mixin import CONFIG_NAME
from lowtide.models.vae import AutoencoderKL
from lowtide.weights.gguf import read_gguf_index
from lowtide.weights.index import PICKLED_SUFFIXES, CheckpointIndex, UnsafeWeightsError, find_weights, read_index


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A network whose configuration is in `folder`, and whose weights are these."""

    folder: Path
    weights: CheckpointIndex


ByComponent = Mapping[str, Elsewhere]


def open_weights(file: str | os.PathLike[str]) -> CheckpointIndex:
    """The weights in a file by the names that they have there, its header read.

    Raises `FileNotFoundError`, `UnsafeWeightsError` for pickled files, and `CheckpointError` for others.
    """
    path = local_path(file)
    suffix = path.suffix.lower()
    if suffix in PICKLED_SUFFIXES:
        raise UnsafeWeightsError(
            f"{path} is pickled, and unpickling a file can run code hidden in it. Take the model's .safetensors file, "
            "or convert it once, where you trust it: torch.load(path, weights_only=True), of which 'state_dict' is to "
            "be taken if it is there, then safetensors.torch.save_file(tensors, 'model.safetensors')."
        )
    if suffix not in (".safetensors", ".gguf"):
        raise CheckpointError(f"{path}: weights are read from .safetensors and .gguf files.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    return read_gguf_index(path) if suffix == ".gguf" else read_index(path)


def vae_from(given: str | os.PathLike[str], configs: Path | None, source: Source) -> Elsewhere:
    """An autoencoder in a file, a folder or on the Hub.

    Its configuration is in its folder, or in that of a pipeline's VAE, `configs`, for a file, whose names are the
    original ones, with or without the prefix that they have in whole models, or those of diffusers. `source` says how
    to ask the Hub. Raises `FileNotFoundError`, and `CheckpointError` for a file of anything else.
    """
    path = local_path(given)
    if path.suffix.lower() in (".safetensors", ".gguf", *PICKLED_SUFFIXES) and not path.is_dir():
        index = open_weights(path)
        if configs is None:
            raise CheckpointError(f"{path}: the model has no configuration of a VAE, which this file does not hold.")
        return Elsewhere(configs, _vae_in(index, configs))
    name = AutoencoderKL.weights_name
    patterns = [CONFIG_NAME, *weight_patterns(name, None)]
    wanted = [prefix + pattern for prefix in ("", "vae/") for pattern in patterns]
    folder = replace(source, name=os.fspath(given), revision=None).fetch(wanted)
    folder = folder if (folder / CONFIG_NAME).is_file() else folder / "vae"
    AutoencoderKL.read_config(folder)
    return Elsewhere(folder, find_weights(folder, name))


def _vae_in(index: CheckpointIndex, configs: Path) -> CheckpointIndex:
    """The weights of an autoencoder in a file, by our names or those of older diffusers."""
    begin = next((prefix for prefix in (*VAE, "") if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in index), None)
    if begin is not None:
        names = {name.removeprefix(begin): name for name in index if name.startswith(begin)}
        return index.renamed({new: index[old] for new, old in names.items()}, names)
    config = AutoencoderKL.read_config(configs)
    found = prefix_and_names(config, index)
    if found is None:
        raise CheckpointError(
            f"{index.files[0]} holds no VAE: it has no {VAE[0]}decoder.conv_in.weight, nor one without {VAE[0]}. Give "
            "the file, folder or Hub id of an autoencoder (AutoencoderKL)."
        )
    return held_in(index, AutoencoderKL.on_meta(configs, config, None), *found).weights
