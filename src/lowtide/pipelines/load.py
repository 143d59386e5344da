"""From a folder or a Hub id to a pipeline, and back to a folder."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowtide.configs import write_json
from lowtide.fitting.checkpoints import Checkpoint
from lowtide.fitting.prepare import Fit, prepare
from lowtide.hub import Source
from lowtide.loading.components import LoadOptions, save_component, spec_of
from lowtide.loading.model_index import MODEL_INDEX, read_model_index
from lowtide.models.mixin import PEER_VERSION
from lowtide.pipelines.parts import KINDS, check_folder, class_to_load, specs_to_load
from lowtide.planning.plan import Budgets
from lowtide.weights.save import atomic_folder


def open_checkpoint(
    source: Source,
    options: LoadOptions,
    pipeline_class: type[Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint, its index read; `pipeline_class` None takes the checkpoint's own.

    Raises `FileNotFoundError` where there is none, and `ValueError` for another class than the checkpoint's, for
    components that the class does not have, and for missing ones.
    """
    own, specs, _ = read_model_index(source.fetch([MODEL_INDEX]))
    given = given or {}
    asked = None if pipeline_class is None else _kind_of(pipeline_class)
    class_name = class_to_load(source.name, own, asked)
    chosen = pipeline_class or getattr(importlib.import_module(KINDS[class_name].module), class_name)
    possible = chosen.component_names
    unknown = sorted(set(given) - set(possible))
    if unknown:
        raise ValueError(f"{chosen.__name__} takes no {unknown}; its components are {', '.join(possible)}.")
    unused = [name for name, spec in specs.items() if spec is not None and name not in possible]
    to_load = specs_to_load(own, possible, chosen.optional_components, specs, given)
    check_folder(class_name, source, to_load, given)
    if unused:
        warnings.warn(f"{chosen.__name__} has no use for the checkpoint's {', '.join(unused)}.", stacklevel=3)
    return Checkpoint(chosen, source, to_load, options, given)


def prepare_checkpoint(
    pretrained: str,
    budgets: Budgets,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    allow: tuple[str, ...] = (),
    **size: Any,
) -> Fit:
    """All that plans for a checkpoint are made from: its configurations are read, and none of its weights.

    A `device` that is not here gets usual rates. Raises as loading does, and `ValueError` for a size that the model
    cannot make.
    """
    meta = open_checkpoint(Source(pretrained), LoadOptions(dtype, variant)).on_meta(device)
    return prepare(meta, budgets, meta.subject.usual_size(**size), allow=allow)


def _kind_of(pipeline_class: type[Any]) -> str:
    """The name of the pipeline of ours that a class is, or is derived from."""
    return next(cls.__name__ for cls in pipeline_class.__mro__ if cls.__name__ in KINDS)


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
