"""Whether a checkpoint is a pipeline of ours, and whether its parts fit each other: from its configurations alone.

Free of torch, so that a wrong model is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowtide.configs import CheckpointError, Config, check_size
from lowtide.hub import Source
from lowtide.loading.model_index import (
    MODEL_INDEX,
    ComponentSpec,
    check_class,
    component_folder,
    config_patterns,
    read_model_index,
)
from lowtide.models.encoder_configs import CLIPTextEntries, SafetyCheckerEntries, T5Entries
from lowtide.models.image_processor_entries import ImageProcessorEntries
from lowtide.models.unet_config import UNet2DConditionConfig
from lowtide.models.vae_config import AutoencoderKLConfig
from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig
from lowtide.models.video_vae_config import AutoencoderKLCogVideoXConfig
from lowtide.models.vocabulary import MOST_VOCABULARY_BYTES, largest_token

Parts = Mapping[str, Any]
"""The configurations of a pipeline's parts by name: mappings, or objects with entries as attributes."""

MADE_HERE = (
    "Lowtide's own pipelines make pictures from text with Stable Diffusion 1.x and 2.x (StableDiffusionPipeline), and "
    "clips with CogVideoX (CogVideoXPipeline)"
)
OTHERS = {
    "StableDiffusionInpaintPipeline": "an inpainting model",
    "StableDiffusionInstructPix2PixPipeline": "a model that edits pictures as instructed (InstructPix2Pix)",
    "StableDiffusionDepth2ImgPipeline": "a depth-to-picture model",
    "StableDiffusionUpscalePipeline": "an upscaling model",
    "StableDiffusionLatentUpscalePipeline": "an upscaling model",
    "StableDiffusionXLPipeline": "an SDXL model",
    "StableDiffusionXLImg2ImgPipeline": "an SDXL model",
    "StableDiffusionXLInpaintPipeline": "an SDXL inpainting model",
    "StableDiffusion3Pipeline": "a Stable Diffusion 3 model",
    "StableVideoDiffusionPipeline": "a picture-to-video model",
    "CogVideoXImageToVideoPipeline": "a picture-to-video model",
    "CogVideoXVideoToVideoPipeline": "a video-to-video model",
    "FluxPipeline": "a Flux model",
}
"""What checkpoints of other classes are, by the names of these."""
CONFIGS: dict[str, type[Config]] = {
    "UNet2DConditionModel": UNet2DConditionConfig,
    "AutoencoderKL": AutoencoderKLConfig,
    "AutoencoderKLCogVideoX": AutoencoderKLCogVideoXConfig,
    "CogVideoXTransformer3DModel": CogVideoXTransformer3DConfig,
    "CLIPTextModel": CLIPTextEntries,
    "T5EncoderModel": T5Entries,
    "StableDiffusionSafetyChecker": SafetyCheckerEntries,
}
"""The configurations of the networks, by the names of their classes."""


@dataclass(frozen=True)
class Kind:
    """A pipeline of ours: its module, its components, which of them may be missing, and what they must agree on."""

    module: str
    components: tuple[str, ...]
    optional: tuple[str, ...]
    check: Callable[[Parts], None]


class UnfitPartsError(CheckpointError):
    """The parts of a pipeline do not fit each other; the message says what the checkpoint is, if that can be told."""


def check_parts(class_name: str, parts: Parts) -> None:
    """Raise `UnfitPartsError` unless the configurations of a pipeline's parts fit; those that are not there do."""
    KINDS[class_name].check(parts)


def describe(class_name: str) -> str:
    """What a checkpoint of this class is."""
    if class_name in KINDS:
        return f"a {class_name}"
    return f"{OTHERS[class_name]} ({class_name})" if class_name in OTHERS else f"a {class_name or 'nameless pipeline'}"


def check_checkpoint(source: Source, class_name: str | None = None) -> str:
    """Read a checkpoint's configurations and raise unless it can be loaded; returns the name of its class.

    `class_name` is that of the pipeline to load it as, None for its own. Raises `FileNotFoundError` where there is
    none, `CheckpointError` for files that are malformed and parts that do not fit each other, and `ValueError` for
    classes that Lowtide does not have.
    """
    own, specs, _ = read_model_index(source.fetch([MODEL_INDEX]))
    chosen = class_to_load(source.name, own, class_name)
    kind = KINDS[chosen]
    check_folder(chosen, source, specs_to_load(own, kind.components, kind.optional, specs), {})
    return own


def class_to_load(name: str, own: str, asked: str | None) -> str:
    """The class to load a checkpoint called `name` as; raises `ValueError` for one that it is not, or we have not."""
    if (asked or own) not in KINDS:
        raise ValueError(
            f"{name} is {describe(own)}. {MADE_HERE}; lowtide.load({name!r}) loads pipelines of all other classes, "
            "through diffusers."
        )
    if asked is not None and own in KINDS and own != asked:
        raise ValueError(
            f"{name} holds a {own}, not a {asked}: load it with that class, or with DiffusionPipeline, which takes the "
            "checkpoint's own."
        )
    return asked or own


def specs_to_load(
    own: str,
    components: Sequence[str],
    optional: Sequence[str],
    specs: Mapping[str, ComponentSpec | None],
    given: Collection[str] = (),
) -> dict[str, ComponentSpec | None]:
    """The components to load: those of the class that are not given. Raises `ValueError` for missing ones."""
    chosen = {name: specs.get(name) for name in components if name not in given}
    missing = [name for name, spec in chosen.items() if spec is None and name not in optional]
    if missing:
        what = "The checkpoint" if own in KINDS else f"The checkpoint is {describe(own)}, and"
        raise ValueError(
            f"{what} has no {', '.join(missing)}: pass it in, as in from_pretrained(..., {missing[0]}=...)."
        )
    return chosen


def check_folder(
    class_name: str,
    source: Source,
    specs: Mapping[str, ComponentSpec | None],
    given: Mapping[str, Any],
    elsewhere: Mapping[str, Path] | None = None,
) -> None:
    """Read the configurations of the components that have a spec, and raise unless all fit, the given ones too.

    Those of components named in `elsewhere` are in these folders.
    """
    for spec in specs.values():
        if spec is not None:
            check_class(spec)
    folder = source.fetch(config_patterns(specs))
    parts: dict[str, Any] = {name: getattr(part, "config", None) for name, part in given.items()}
    for name, spec in specs.items():
        if spec is not None:
            place = (elsewhere or {}).get(name)
            parts[name] = _configuration(place or component_folder(folder, name), spec)
    try:
        check_parts(class_name, parts)
    except UnfitPartsError as error:
        raise UnfitPartsError(f"{folder}: {error}") from error


def _configuration(folder: Path, spec: ComponentSpec) -> Any:
    """What parts are checked by; None where there is no file, which loading reports."""
    for file in folder.glob("*.json"):
        check_size(file, MOST_VOCABULARY_BYTES)
    config, processor = folder / "config.json", folder / "preprocessor_config.json"
    if spec.class_name in CONFIGS and config.is_file():
        return CONFIGS[spec.class_name].from_file(config)
    if spec.name == "tokenizer":
        return {"largest_token": largest_token(folder)}
    if spec.name == "feature_extractor" and processor.is_file():
        return ImageProcessorEntries.from_file(processor)
    return None


def _check_pictures(parts: Parts) -> None:
    """Stable Diffusion: the U-Net reads the VAE's latents and the text encoder's states."""
    unet, vae = parts.get("unet"), parts.get("vae")
    latents = _number(vae, "latent_channels") or 4
    reads = _number(unet, "in_channels") or latents
    if _entry(unet, "addition_embed_type") is not None:
        _refuse(f"this is an SDXL model: its U-Net has addition_embed_type={_entry(unet, 'addition_embed_type')!r}.")
    if reads != latents:
        beside = {
            latents + 5: "this is an inpainting model: it reads a mask and a masked picture beside the latents",
            2 * latents: "this is a model that edits pictures (InstructPix2Pix): it reads a picture beside the latents",
            latents + 1: "this is a depth-to-picture model: it reads a map of depths beside the latents",
            latents + 3: "this is an upscaling model: it reads a small picture beside the latents",
        }
        said = beside.get(reads, "they are of different models")
        _refuse(f"{said} (unet in_channels={reads}, vae latent_channels={latents}).")
    _check_equal(parts, ("unet", "out_channels"), ("vae", "latent_channels"))
    _check_equal(parts, ("unet", "cross_attention_dim"), ("text_encoder", "hidden_size"))
    _check_text(parts)
    _check_of_pictures(parts)
    _check_safety(parts)


def _check_clips(parts: Parts) -> None:
    """CogVideoX: the transformer reads the VAE's latents and the text encoder's states."""
    latents, reads = _number(parts.get("vae"), "latent_channels"), _number(parts.get("transformer"), "in_channels")
    if latents is not None and reads == 2 * latents:
        _refuse(
            "this is a picture-to-video model: it reads a picture beside the latents "
            f"(transformer in_channels={reads}, vae latent_channels={latents})."
        )
    _check_equal(parts, ("transformer", "in_channels"), ("vae", "latent_channels"))
    _check_equal(parts, ("transformer", "out_channels"), ("vae", "latent_channels"))
    _check_equal(parts, ("transformer", "text_embed_dim"), ("text_encoder", "d_model"))
    _check_text(parts)
    _check_of_pictures(parts)


def _check_text(parts: Parts) -> None:
    largest, words = _number(parts.get("tokenizer"), "largest_token"), _number(parts.get("text_encoder"), "vocab_size")
    if largest is not None and words is not None and largest >= words:
        _refuse(f"the tokenizer has a token of number {largest}, and the text_encoder has vocab_size={words} of them.")


def _check_of_pictures(parts: Parts) -> None:
    """The VAE's pictures have three channels: those of a model for masks or depths have others."""
    for entry in ("in_channels", "out_channels"):
        channels = _number(parts.get("vae"), entry)
        if channels not in (None, 3):
            _refuse(f"the vae has {entry}={channels}, and pictures have 3 channels.")


def _check_safety(parts: Parts) -> None:
    """The safety checker looks at pictures of one size, to which the feature extractor must bring them."""
    size = _number(_entry(parts.get("safety_checker"), "vision_config"), "image_size")
    crop = _entry(parts.get("feature_extractor"), "crop_size")
    sides = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    if size is not None and any(type(side) is int and side != size for side in sides.values()):
        _refuse(f"the feature_extractor has crop_size={crop!r:.80}, and the safety_checker image_size={size}.")


def _check_equal(parts: Parts, first: tuple[str, str], second: tuple[str, str]) -> None:
    """Raise unless two entries, each as (part, entry), are equal or one is not there."""
    values = [_number(parts.get(part), entry) for part, entry in (first, second)]
    if None not in values and values[0] != values[1]:
        said = [f"the {part} has {entry}={value}" for (part, entry), value in zip((first, second), values, strict=True)]
        _refuse(f"{', and '.join(said)}; they are of different models.")


def _refuse(reason: str) -> NoReturn:
    raise UnfitPartsError(f"These parts make no pipeline: {reason} {MADE_HERE}.")


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, (Mapping, Config)) else getattr(config, name, None)


def _number(config: Any, name: str) -> int | None:
    value = _entry(config, name)
    return value if type(value) is int else None


KINDS = {
    "StableDiffusionPipeline": Kind(
        "lowtide.pipelines.stable_diffusion",
        ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor"),
        ("safety_checker", "feature_extractor"),
        _check_pictures,
    ),
    "CogVideoXPipeline": Kind(
        "lowtide.pipelines.cogvideox",
        ("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
        (),
        _check_clips,
    ),
}
"""The pipelines, by the names that checkpoints use."""
