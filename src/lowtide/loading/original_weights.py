"""The weights of each network in a file of original names: by our names, each where it lies in the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import translate

import torch
from torch import nn

from lowtide.casting.cast_files import holds_in_blocks
from lowtide.configs import Config
from lowtide.loading.original_names import CLIP_NAMES, OriginalNames, Place, open_clip_names, unet_names, vae_names
from lowtide.models.encoder_configs import CLIPTextEntries
from lowtide.models.unet_config import UNet2DConditionConfig
from lowtide.models.vae_config import AutoencoderKLConfig
from lowtide.weights.index import CheckpointError, CheckpointIndex, TensorEntry
from lowtide.weights.slots import slots

UNET = "model.diffusion_model."
OPEN_CLIP = "cond_stage_model.model."
CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
VAE = ("first_stage_model.", "vae.")
"""What names of each network's weights begin with, in a file that holds several."""
STRAY = (
    "*model_ema.*", "*alphas_cumprod*", "betas", "log_one_minus_*", "posterior_*", "sqrt_*", "lvlb_weights", "logvar",
    "scale_factor", "global_step", "v_pred", "ztsnr", "denoiser.*", "embedding_manager.*", "*first_stage_model.loss.*",
    "*embeddings.position_ids", "cond_stage_model.*logit_scale", "cond_stage_model.*text_projection*",
    "cond_stage_model.*attn_mask",
)  # fmt: skip
"""Patterns (`fnmatch`) of what such files hold beside the networks: averages of weights, tables of noise, losses, and
the part of the text encoder that compares texts with pictures."""
_STRAY = re.compile("|".join(map(translate, STRAY)))
_LAYER = re.compile(rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.\d+\.")
_SAID = 3


@dataclass(frozen=True, eq=False)
class Held:
    """A network's weights by its own names, and the names that these have in the file, which begin with `prefix`."""

    weights: CheckpointIndex
    names: frozenset[str]
    prefix: str


def prefix_and_names(config: Config, index: CheckpointIndex) -> tuple[str, OriginalNames] | None:
    """What names of a network's weights begin with in a file, and the rest of them; None where it holds none."""
    if isinstance(config, UNet2DConditionConfig):
        sign, possible = "conv_in.weight", [(UNET, unet_names(config))]
    elif isinstance(config, AutoencoderKLConfig):
        sign, possible = "decoder.conv_in.weight", [(prefix, vae_names(config)) for prefix in (*VAE, "")]
    else:
        assert isinstance(config, CLIPTextEntries)
        sign, possible = "embeddings.token_embedding.weight", [(prefix, CLIP_NAMES) for prefix in CLIP]
        possible.append((OPEN_CLIP, open_clip_names(config)))
    return next(((prefix, names) for prefix, names in possible if prefix + names.place(sign).name in index), None)


def held_in(index: CheckpointIndex, network: nn.Module, prefix: str, names: OriginalNames) -> Held:
    """The weights of a network on meta.

    Raises `CheckpointError`, which names some, where the file lacks any, or has them in other shapes.
    """
    entries: dict[str, TensorEntry] = {}
    places = {slot.name: names.place(slot.name) for slot in slots(network) if slot.kind != "transient"}
    shapes = {slot.name: tuple(slot.tensor.shape) for slot in slots(network)}
    missing = [prefix + place.name for place in places.values() if prefix + place.name not in index]
    if missing:
        raise _unfit(index, network, f"it lacks {_some(missing)}")
    for name, place in places.items():
        entries[name] = _in_form(_rows(index[prefix + place.name], place), len(shapes[name]))
    differing = [
        f"{prefix}{place.name} is {list(index[prefix + place.name].shape)}"
        for name, place in places.items()
        if entries[name].shape != shapes[name] and not holds_in_blocks(entries[name], shapes[name])
    ]
    if differing:
        raise _unfit(index, network, f"its {_some(differing)}, which do not fit")
    return Held(replace(index, entries=entries), frozenset(prefix + place.name for place in places.values()), prefix)


def check_all_known(index: CheckpointIndex, held: Iterable[Held]) -> None:
    """Raise `CheckpointError`, which names some, for tensors of networks that these do not have, and of unknown ones.

    Those of networks that are taken from elsewhere are not looked at.
    """
    used = frozenset[str]().union(*(part.names for part in held))
    elsewhere = tuple({UNET, OPEN_CLIP, *CLIP, *VAE} - {part.prefix for part in held})
    strange = [
        name
        for name in index.keys() - used
        if not _STRAY.match(name)
        and not _is_of_unused_layer(name, used)
        and not (name.startswith(elsewhere) and not name.startswith(tuple(part.prefix for part in held)))
    ]
    if strange:
        raise CheckpointError(
            f"{index.files[0]}: no network of such a model has {_some(sorted(strange))}. What was added to a model by "
            "its training is not read: take the file without it, or give the configurations that belong to it "
            "(config=, --config)."
        )


def _rows(entry: TensorEntry, place: Place) -> TensorEntry:
    """The rows of a tensor that a place says: they lie behind each other in the file."""
    if place.parts == 1 or entry.shape[0] % place.parts:
        return entry
    nbytes, rows = entry.nbytes // place.parts, entry.shape[0] // place.parts
    return replace(entry, offset=entry.offset + place.part * nbytes, nbytes=nbytes, shape=(rows, *entry.shape[1:]))


def _in_form(entry: TensorEntry, dimensions: int) -> TensorEntry:
    """The weight of a 1x1 convolution [O, I, 1, 1] as that of a linear layer [O, I], and the reverse."""
    if entry.dtype == torch.uint8:  # in blocks, rows of whatever form
        return entry
    if dimensions == 2 and len(entry.shape) > 2 and set(entry.shape[2:]) == {1}:
        return replace(entry, shape=entry.shape[:2])
    return replace(entry, shape=(*entry.shape, 1, 1)) if dimensions == 4 and len(entry.shape) == 2 else entry


def _is_of_unused_layer(name: str, used: frozenset[str]) -> bool:
    """Whether it is of a layer of OpenCLIP's that the text encoder does not have: its last ones are left out."""
    layer = _LAYER.match(name)
    return layer is not None and f"{layer[0]}ln_1.weight" not in used


def _unfit(index: CheckpointIndex, network: nn.Module, what: str) -> CheckpointError:
    return CheckpointError(
        f"{index.files[0]}: {what}, for its {type(network).__name__}. Get the file again if it is not whole, or give "
        "the configurations that belong to it (config=, --config), or another network in place of this one."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return ", ".join(name[:200] for name in names[:_SAID]) + more
