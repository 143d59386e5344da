"""Networks whose files are not in their checkpoint's folder: where they are, and how they are found there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowtide.configs import CheckpointError
from lowtide.hub import Source, local_path, weight_patterns
from lowtide.loading.model_index import ComponentSpec, component_folder
from lowtide.loading.original_weights import VAE, held_in, prefix_and_names
from lowtide.models.mixin import CONFIG_NAME
from lowtide.models.tokenizers import CLIPTokenizer, load_tokenizer
from lowtide.models.vae import AutoencoderKL
from lowtide.weights.gguf import GgufIndex, read_gguf_index, resting_index
from lowtide.weights.index import PICKLED_SUFFIXES, CheckpointIndex, UnsafeWeightsError, find_weights, read_index


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A network whose configuration is in `folder`, and whose weights are these."""

    folder: Path
    weights: CheckpointIndex


WEIGHTS = (".safetensors", ".gguf")
_OF_DIFFUSERS = "encoder.down_blocks.0.resnets.0.conv1.weight"
"""A name that autoencoders have in diffusers' files alone."""
ByComponent = Mapping[str, Elsewhere]


def open_weights(file: str | os.PathLike[str]) -> CheckpointIndex:
    """The weights in a file by the names that they have there, its header read.

    Raises `FileNotFoundError`, `UnsafeWeightsError` for pickled files, and `CheckpointError` for others.
    """
    path = local_path(file)
    check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    return read_gguf_index(path) if path.suffix.lower() == ".gguf" else read_index(path)


def check_suffix(path: Path) -> None:
    """Raise for a file whose name is of no weights: `UnsafeWeightsError` for pickled ones, else `CheckpointError`."""
    suffix = path.suffix.lower()
    if suffix in PICKLED_SUFFIXES:
        raise UnsafeWeightsError(
            f"{path} is pickled, and unpickling a file can run code hidden in it. Take the model's .safetensors file, "
            "or convert it once, where you trust it: torch.load(path, weights_only=True), of which 'state_dict' is to "
            "be taken if it is there, then safetensors.torch.save_file(tensors, 'model.safetensors')."
        )
    if suffix not in WEIGHTS:
        raise CheckpointError(f"{path}: weights are read from {' and '.join(WEIGHTS)} files.")


def as_it_rests(weights: CheckpointIndex) -> CheckpointIndex:
    """Weights as networks of ours hold them: those of a GGUF file in its blocks.

    Raises `CheckpointError` for blocks of other kinds than ours.
    """
    return resting_index(weights) if isinstance(weights, GgufIndex) else weights


def vae_from(given: str | os.PathLike[str], spec: ComponentSpec | None, source: Source) -> Elsewhere:
    """An autoencoder in a file, a folder or on the Hub, in place of the one that a checkpoint's `spec` says.

    Its configuration is in its folder, that of a file in the checkpoint at `source`. A file's names are the original
    ones, with or without the prefix that they have in whole models, or those of diffusers. Raises `FileNotFoundError`,
    and `CheckpointError` for what holds no such autoencoder.
    """
    if spec is None or spec.class_name != AutoencoderKL.__name__:
        raise ValueError(f"vae={os.fspath(given)!r}: files and folders are read for an {AutoencoderKL.__name__} alone.")
    path = local_path(given)
    if path.suffix.lower() in (*WEIGHTS, *PICKLED_SUFFIXES) and not path.is_dir():
        folder = component_folder(source.fetch([f"{spec.name}/*.json"]), spec.name)
        return Elsewhere(folder, _vae_in(as_it_rests(open_weights(path)), folder))
    files = [CONFIG_NAME, *weight_patterns(AutoencoderKL.weights_name, None)]
    fetched = replace(source, name=os.fspath(given), revision=None).fetch(
        prefix + file for prefix in ("", f"{spec.name}/") for file in files
    )
    folder = fetched if (fetched / CONFIG_NAME).is_file() else fetched / spec.name
    AutoencoderKL.read_config(folder)
    return Elsewhere(folder, find_weights(folder, AutoencoderKL.weights_name))


def tokenizer_from(given: str | os.PathLike[str], spec: ComponentSpec | None, source: Source) -> Any:
    """The tokenizer in a folder or on the Hub, alone or as that of a pipeline, in place of that of a `spec`.

    Raises as `load_tokenizer` does.
    """
    class_name = CLIPTokenizer.__name__ if spec is None else spec.class_name
    fetched = replace(source, name=os.fspath(given), revision=None).fetch(
        prefix + file for prefix in ("", "tokenizer/") for file in ("*.json", "*.txt", "*.model")
    )
    within = fetched / "tokenizer"
    return load_tokenizer(within if within.is_dir() else fetched, class_name)


def _vae_in(index: CheckpointIndex, configs: Path) -> CheckpointIndex:
    """The weights of an autoencoder in a file, by our names or those of older diffusers."""
    begin = next((prefix for prefix in (*VAE, "") if prefix + _OF_DIFFUSERS in index), None)
    if begin is not None:
        entries = {name.removeprefix(begin): entry for name, entry in index.items() if name.startswith(begin)}
        return replace(index, entries=entries)
    config = AutoencoderKL.read_config(configs)
    found = prefix_and_names(config, index)
    if found is None:
        raise CheckpointError(
            f"{index.files[0]} holds no VAE: it has no {VAE[0]}decoder.conv_in.weight, nor one without {VAE[0]}. Give "
            "the file, folder or Hub id of an autoencoder (AutoencoderKL)."
        )
    return held_in(index, AutoencoderKL.on_meta(configs, config, None), *found).weights
