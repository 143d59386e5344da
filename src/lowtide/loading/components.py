"""Load and save the components of a checkpoint's folder; the tables list every class that a component can have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lowtide.casting.casting import Casting
from lowtide.configs import write_json
from lowtide.hub import Source, weight_patterns
from lowtide.loading.model_index import ComponentSpec, check_class, component_folder
from lowtide.models.bounded_build import build_on_meta
from lowtide.models.foreign import read_foreign_config, reading
from lowtide.models.foreign_configs import CLIPTextEntries, ForeignConfig, T5Entries
from lowtide.models.image_processor_entries import ImageProcessorEntries
from lowtide.models.mixin import WEIGHTS_NAME, ModelMixin
from lowtide.models.put_weights import Offload, put_weights, resting_state
from lowtide.models.safety_checker import StableDiffusionSafetyChecker, position_ids
from lowtide.models.tokenizers import TOKENIZERS, load_tokenizer
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.models.video_vae import AutoencoderKLCogVideoX
from lowtide.quiet import quiet
from lowtide.schedulers import SCHEDULERS
from lowtide.weights.fill import state_names
from lowtide.weights.index import CheckpointIndex, find_weights, variants_in
from lowtide.weights.names import CLIP_TEXT_NAMES, T5_NAMES, NameTable, apply_names
from lowtide.weights.save import save_tensors

MODELS: dict[str, type[ModelMixin]] = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoX,
    "CogVideoXTransformer3DModel": CogVideoXTransformer3DModel,
}
TEXT_ENCODERS: dict[str, NameTable] = {"CLIPTextModel": CLIP_TEXT_NAMES, "T5EncoderModel": T5_NAMES}
TEXT_ENTRIES: dict[str, type[ForeignConfig]] = {"CLIPTextModel": CLIPTextEntries, "T5EncoderModel": T5Entries}
FLOAT32_BESIDE_FLOAT16: dict[str, tuple[str, ...]] = {"T5EncoderModel": ("*.DenseReluDense.wo.weight",)}
"""Patterns of weights that overflow in float16: they are float32 where the others are float16.

Where they rest in 8 bits, they compute in float32. This holds while loading: a later `.to(torch.float16)` makes them
float16 as well, as it does in other libraries.
"""
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
            yield from (f"{name}/{pattern}" for pattern in weight_patterns(weights_name(spec.class_name), variant))


def weights_name(class_name: str) -> str:
    """What the weights of a network of this class are called."""
    return WEIGHTS_NAME if class_name in MODELS else "model"


def without_variant(folder: Path, specs: Mapping[str, ComponentSpec | None], variant: str | None) -> list[str]:
    """The networks whose plain weights are loaded, since a folder has none of the `variant` asked for.

    If no network has any, there is nothing to fall back from: the list is empty, and finding the weights raises.
    """
    networks = {name: spec for name, spec in specs.items() if spec is not None and _is_network(spec.class_name)}
    names = [
        name
        for name, spec in networks.items()
        if variant is not None and variant not in variants_in(folder / name, weights_name(spec.class_name))
    ]
    return names if len(names) < len(networks) else []


def _is_network(class_name: str) -> bool:
    return class_name in MODELS or class_name in TEXT_ENCODERS or class_name == "StableDiffusionSafetyChecker"


def load_components(
    source: Source,
    specs: Mapping[str, ComponentSpec | None],
    options: LoadOptions,
    own_options: Mapping[str, LoadOptions] | None = None,
) -> dict[str, Any]:
    """Load every component that has a spec; networks are built on meta and filled from the mapped files.

    `own_options` replaces `options` for some components, by name. Raises `ValueError` for a class that Lowtide does not
    have, before anything is read; otherwise raises as `ModelMixin.from_pretrained` does.
    """
    loaders = {name: None if spec is None else _loader(spec) for name, spec in specs.items()}
    folder = source.fetch(component_patterns(specs, options.variant))
    for name in (name for name, loader in loaders.items() if loader is not None):
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
    if isinstance(component, (ModelMixin, StableDiffusionSafetyChecker)):
        component.write_to(folder, variant=variant, max_shard_size=max_shard_size)
    elif isinstance(component, transformers.PreTrainedModel):
        write_json(folder / "config.json", component.config.to_dict())
        tensors = {_published(component, name): tensor for name, tensor in resting_state(component).items()}
        save_tensors(tensors, folder, "model", variant=variant, max_shard_size=max_shard_size)
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
    if isinstance(component, StableDiffusionSafetyChecker):
        return ComponentSpec(name, "stable_diffusion", cls.__name__)
    library = "transformers" if cls.__module__.startswith("transformers.") else "diffusers"
    return ComponentSpec(name, library, cls.__name__.removesuffix("Pil"))


def load_text_encoder(folder: Path, class_name: str, options: LoadOptions) -> nn.Module:
    """Build a text encoder of `transformers` on meta and fill it from the mapped weights in `folder`."""
    entries = read_foreign_config(folder, TEXT_ENTRIES[class_name], class_name)
    weights = find_weights(folder, "model", options.variant)
    model = text_encoder_on_meta(folder, class_name, entries, options.dtype, weights)
    index = apply_names(weights, TEXT_ENCODERS[class_name], state_names(model))
    put_weights(
        model,
        index,
        dtype=options.dtype,
        offload=options.offload,
        casting=options.casting,
        float32_beside_float16=FLOAT32_BESIDE_FLOAT16.get(class_name, ()),
        buffers=position_ids(model),
    )
    return model.eval()


def text_encoder_on_meta(
    folder: Path, class_name: str, entries: ForeignConfig, dtype: torch.dtype | None, weights: CheckpointIndex | None
) -> nn.Module:
    """The text encoder of `transformers` that a folder's configuration describes, its weights on meta."""
    cls: Any = getattr(transformers, class_name)
    with reading(folder, class_name):
        config = cls.config_class(**entries.entries())
        config.dtype = dtype
        return build_on_meta(lambda: cls(config), folder / "config.json", entries.entries(), weights)


def _loader(spec: ComponentSpec) -> Callable[[Path, LoadOptions], Any]:
    """The function that loads a component's folder."""
    check_class(spec)
    name = spec.class_name
    if name in MODELS:
        return lambda folder, options: MODELS[name].from_folder(folder, **vars(options))
    if name in SCHEDULERS:
        return lambda folder, _: SCHEDULERS[name].from_pretrained(folder)
    if name == "StableDiffusionSafetyChecker":
        return lambda folder, options: StableDiffusionSafetyChecker.from_folder(folder, **vars(options))
    if name in TEXT_ENCODERS:
        return lambda folder, options: load_text_encoder(folder, name, options)
    if name in TOKENIZERS:
        return lambda folder, _: load_tokenizer(folder, name)
    assert name in IMAGE_PROCESSORS, name
    return lambda folder, _: load_image_processor(folder)


def load_image_processor(folder: Path) -> Any:
    """CLIP's image processor that uses Pillow: the other one needs torchvision, which Lowtide does without."""
    cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name}.")
    ImageProcessorEntries.from_file(file)
    with reading(folder, cls.__name__), quiet(FutureWarning):
        return cls.from_pretrained(folder, local_files_only=True)


def _published(component: nn.Module, name: str) -> str:
    """Checkpoints of CLIP's text model are published with a prefix that transformers 5 dropped from the class."""
    prefixed = type(component).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
    return f"text_model.{name}" if prefixed else name
