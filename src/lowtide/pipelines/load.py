"""From a folder or a Hub id to a pipeline, and back to a folder."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowtide.configs import Config, write_json
from lowtide.fitting.checkpoints import Checkpoint
from lowtide.fitting.prepare import Fit, prepare
from lowtide.hub import Source
from lowtide.loading.components import LoadOptions, save_component, spec_of
from lowtide.loading.elsewhere import tokenizer_from, vae_from
from lowtide.loading.model_index import MODEL_INDEX, ComponentSpec, read_model_index
from lowtide.loading.original_file import FileOptions, OriginalFile, check_no_options
from lowtide.models.mixin import PEER_VERSION
from lowtide.pipelines.parts import KINDS, check_folder, class_to_load, specs_to_load
from lowtide.planning.plan import Budgets
from lowtide.weights.save import atomic_folder

BY_PATH = ("vae", "tokenizer")
"""Components that may be given by where they are."""
_PATHS = (str, os.PathLike)


def open_checkpoint(
    source: Source,
    options: LoadOptions,
    pipeline_class: type[Any] | None = None,
    given: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    file_options: FileOptions | None = None,
) -> Checkpoint:
    """A checkpoint, its index read; `pipeline_class` None takes the checkpoint's own.

    `given` are components, and settings of the class, that are used instead of the checkpoint's; a VAE and a tokenizer
    may be the paths or Hub ids of theirs. `dtypes` are those of some components by name. The source may be a file of
    all weights under their original names, of which `file_options` tell what it does not say. Raises
    `FileNotFoundError` where there is none, and `ValueError` for another class than the checkpoint's, for components
    that the class does not have, and for missing ones.
    """
    original = _original(source, file_options or FileOptions(), options.variant)
    name, source = source.name, source if original is None else original.own_configs()
    own, specs, _ = read_model_index(source.fetch([MODEL_INDEX]))
    asked = None if pipeline_class is None else _kind_of(pipeline_class)
    class_name = class_to_load(name, own, asked)
    chosen = pipeline_class or getattr(importlib.import_module(KINDS[class_name].module), class_name)
    given = dict(given or {})
    _check_names(chosen, given, dtypes or {})
    unused = [name for name, spec in specs.items() if spec is not None and name not in chosen.component_names]
    paths = {name: given.pop(name) for name in BY_PATH if isinstance(given.get(name), _PATHS)}
    if original is not None:
        given |= original.small_parts({**given, **paths})
    if "tokenizer" in paths:
        given["tokenizer"] = tokenizer_from(paths["tokenizer"], specs.get("tokenizer"), source)
    if "vae" in paths:
        specs = {**specs, "vae": specs.get("vae") or ComponentSpec("vae", "diffusers", "AutoencoderKL")}
    to_load = specs_to_load(own, chosen.component_names, chosen.optional_components, specs, given)
    elsewhere = {"vae": vae_from(paths["vae"], to_load["vae"], source)} if "vae" in paths else {}
    if original is not None:
        elsewhere |= original.networks(to_load, elsewhere)
    check_folder(class_name, source, to_load, given, {name: place.folder for name, place in elsewhere.items()})
    if unused:
        warnings.warn(f"{chosen.__name__} has no use for the checkpoint's {', '.join(unused)}.", stacklevel=3)
    return Checkpoint(chosen, source, to_load, options, given, dtypes or {}, elsewhere)


def _original(source: Source, options: FileOptions, variant: str | None) -> OriginalFile | None:
    """The file of all weights that a source is, if it is one; raises `ValueError` for what does not go with it."""
    original = OriginalFile.at(source, options)
    if original is None:
        check_no_options(source, options)
    elif variant is not None:
        raise ValueError(f"variant={variant!r} is for folders: {source.name} is the file that is read.")
    return original


def _check_names(cls: Any, given: Mapping[str, Any], dtypes: Mapping[str, Any]) -> None:
    """Raise `ValueError` for components, and dtypes of components, that a class does not have."""
    possible = cls.component_names
    unknown = sorted(set(given) - {*possible, *cls.setting_names})
    if unknown:
        raise ValueError(f"{cls.__name__} takes no {unknown}; its components are {', '.join(possible)}.")
    strange = sorted(set(dtypes) - set(possible))
    if strange:
        raise ValueError(f"dtype has {strange}; the components are {', '.join(possible)}, or 'default'.")


def prepare_checkpoint(
    pretrained: str,
    budgets: Budgets,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    allow: tuple[str, ...] = (),
    given: Mapping[str, Any] | None = None,
    file_options: FileOptions | None = None,
    **size: Any,
) -> Fit:
    """All that plans for a checkpoint are made from: its configurations are read, and none of its weights.

    See `open_checkpoint` for what is `given`, and for `file_options`.
    A `device` that is not here gets usual rates. Raises as loading does, and `ValueError` for a size that the model
    cannot make.
    """
    options = LoadOptions(dtype, variant)
    checkpoint = open_checkpoint(Source(pretrained), options, given=given, file_options=file_options)
    meta = checkpoint.on_meta(device)
    return prepare(meta, budgets, meta.subject.usual_size(**size), allow=allow)


def _kind_of(pipeline_class: type[Any]) -> str:
    """The name of the pipeline of ours that a class is, or is derived from."""
    return next(cls.__name__ for cls in pipeline_class.__mro__ if cls.__name__ in KINDS)


def pipeline_from(pipeline_class: Any, other: Any, given: Mapping[str, Any]) -> Any:
    """A pipeline of a class, of the components of another but for those given; raises `ValueError` where some lack."""
    names = (*pipeline_class.component_names, *pipeline_class.setting_names)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{pipeline_class.__name__} takes no {unknown}; it takes {', '.join(names)}.")
    parts = {name: getattr(other, name) for name in names if hasattr(other, name)} | dict(given)
    missing = [name for name in pipeline_class.component_names if name not in parts]
    missing = [name for name in missing if name not in pipeline_class.optional_components]
    if missing:
        raise ValueError(
            f"A {type(other).__name__} has no {', '.join(missing)}: pass it in, as in from_pipe(..., {missing[0]}=...)."
        )
    return pipeline_class(**parts)


def pipeline_config(pipe: Any) -> Config:
    """The library and class of every component, and the settings of the pipeline's class."""
    specs = {name: None if part is None else spec_of(name, part) for name, part in pipe.components.items()}
    parts = {name: (None, None) if spec is None else (spec.library, spec.class_name) for name, spec in specs.items()}
    settings = {name: getattr(pipe, name) for name in pipe.setting_names}
    return Config(unused={"_class_name": type(pipe).__name__, **parts, **settings})


def save_pipeline(
    class_name: str, components: Mapping[str, Any], folder: Path, variant: str | None, max_shard_size: int | str | None
) -> None:
    """Write components and their index, all or nothing: a killed save leaves what was there before."""
    specs = {name: spec_of(name, part) for name, part in components.items() if part is not None}
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": PEER_VERSION}
    for name in components:
        index[name] = [specs[name].library, specs[name].class_name] if name in specs else [None, None]
    with atomic_folder(folder) as target:
        for name in specs:
            save_component(components[name], target / name, variant=variant, max_shard_size=max_shard_size)
        write_json(target / MODEL_INDEX, index)
