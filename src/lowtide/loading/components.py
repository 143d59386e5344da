"""Load and save the components of a checkpoint's folder; the tables list every class that a component can have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowtide.casting.casting import Casting
from lowtide.hub import Source, weight_patterns
from lowtide.loading.elsewhere import ByComponent, Elsewhere
from lowtide.loading.model_index import ComponentSpec, check_class, component_folder
from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.foreign import is_of_transformers, save_foreign
from lowtide.models.image_processor import CLIPImageProcessor
from lowtide.models.mixin import ModelMixin
from lowtide.models.put_weights import Offload
from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.models.t5 import T5EncoderModel
from lowtide.models.tokenizers import TOKENIZERS, load_tokenizer
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.models.video_vae import AutoencoderKLCogVideoX
from lowtide.schedulers import SCHEDULERS
from lowtide.weights.index import variants_in

MODELS: dict[str, type[ModelMixin]] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
    "CogVideoXTransformer3DModel": CogVideoXTransformer3DModel,
    "CLIPTextModel": CLIPTextModel,
    "T5EncoderModel": T5EncoderModel,
    "StableDiffusionSafetyChecker": StableDiffusionSafetyChecker,
}
IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


@dataclass(frozen=True)
class LoadOptions:
    """How weights are loaded: `dtype` None keeps the file's own, with `casting` they rest in 8 bits.

    Under an `offload` they are not read yet.
    """

    dtype: torch.dtype | None
    variant: str | None = None
    offload: Offload | None = None
    casting: Casting | None = None


def component_patterns(specs: Mapping[str, ComponentSpec | None], variant: str | None) -> Iterator[str]:
    """File patterns of the components to be loaded: configurations, vocabularies, and weights of one variant."""
    for name, spec in specs.items():
        if spec is not None:
            yield from (f"{name}/{pattern}" for pattern in ("*.json", "*.txt", "*.model"))
            if spec.class_name in MODELS:
                yield from (f"{name}/{pattern}" for pattern in weight_patterns(weights_name(spec.class_name), variant))


def weights_name(class_name: str) -> str:
    """What the weights of a network of this class are called."""
    return MODELS[class_name].weights_name


def without_variant(folder: Path, specs: Mapping[str, ComponentSpec | None], variant: str | None) -> list[str]:
    """The networks whose plain weights are loaded, since a folder has none of the `variant` asked for.

    If no network has any, there is nothing to fall back from: the list is empty, and finding the weights raises.
    """
    networks = {name: spec for name, spec in specs.items() if spec is not None and spec.class_name in MODELS}
    names = [
        name
        for name, spec in networks.items()
        if variant is not None and variant not in variants_in(folder / name, weights_name(spec.class_name))
    ]
    return names if len(names) < len(networks) else []


def load_components(
    source: Source,
    specs: Mapping[str, ComponentSpec | None],
    options: LoadOptions,
    own_options: Mapping[str, LoadOptions] | None = None,
    elsewhere: ByComponent | None = None,
) -> dict[str, Any]:
    """Load every component that has a spec; networks are built on meta and filled from the mapped files.

    `own_options` replaces `options` for some components, by name; those named in `elsewhere` are loaded from there.
    Raises `ValueError` for a class that Lowtide does not have, before anything is read; otherwise raises as
    `ModelMixin.from_pretrained` does.
    """
    elsewhere = elsewhere or {}
    loaders = {name: None if spec is None else _loader(spec, elsewhere.get(name)) for name, spec in specs.items()}
    specs = {name: spec for name, spec in specs.items() if name not in elsewhere}
    folder = source.fetch(component_patterns(specs, options.variant))
    for name in (name for name, spec in specs.items() if spec is not None):
        component_folder(folder, name)
    chosen = {name: (own_options or {}).get(name, options) for name in loaders}
    plain = without_variant(folder, specs, options.variant)
    if plain:
        warnings.warn(
            f"{source.name} has no variant {options.variant!r} of {', '.join(plain)}: the plain weights are loaded.",
            stacklevel=4,
        )
        source.fetch(component_patterns({name: specs[name] for name in plain}, None))
        chosen |= {name: replace(chosen[name], variant=None) for name in plain}
    return {name: None if load is None else load(folder / name, chosen[name]) for name, load in loaders.items()}


def save_component(component: Any, folder: Path, *, variant: str | None, max_shard_size: int | str | None) -> None:
    """Create `folder` and write one component's files into it."""
    folder.mkdir(parents=True)
    if isinstance(component, ModelMixin):
        component.write_to(folder, variant=variant, max_shard_size=max_shard_size)
    elif is_of_transformers(component):
        save_foreign(component, folder, variant=variant, max_shard_size=max_shard_size)
    elif hasattr(component, "save_pretrained"):
        component.save_pretrained(folder)
    else:
        raise ValueError(
            f"The {folder.name} is a {type(component).__name__}, which cannot be saved: it has no save_pretrained. "
            "Put the original back before saving."
        )


def spec_of(name: str, component: Any) -> ComponentSpec:
    """The line of `model_index.json` under which a component is saved."""
    cls = type(component)
    of_transformers = cls.__module__.startswith("transformers.")
    library = getattr(cls, "library", "transformers" if of_transformers else "diffusers")
    return ComponentSpec(name, library, cls.__name__.removesuffix("Pil"))


def _loader(spec: ComponentSpec, place: Elsewhere | None) -> Callable[[Path, LoadOptions], Any]:
    """The function that loads a component's folder, or what is in another `place`."""
    check_class(spec)
    name = spec.class_name
    if place is not None:
        return lambda _, options: MODELS[name].from_folder(place.folder, weights=place.weights, **vars(options))
    if name in MODELS:
        return lambda folder, options: MODELS[name].from_folder(folder, **vars(options))
    if name in SCHEDULERS:
        return lambda folder, _: SCHEDULERS[name].from_pretrained(folder)
    if name in TOKENIZERS:
        return lambda folder, _: load_tokenizer(folder, name)
    assert name in IMAGE_PROCESSORS, name
    return lambda folder, _: CLIPImageProcessor.from_pretrained(folder)
