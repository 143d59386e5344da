"""Tiny pipelines in single files under their original names, beside folders with their configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests import original_names
from tests.guests.families_two_streams import GUIDED, HEADS, PLAIN_LATENTS
from tests.guests.families_unets import BLOCKS, LARGE, TEXT_CALL, large_parts, stable_diffusion, unet
from tests.guests.family import Family, family, modules_of, ready

import lowtide
from lowtide.planning.plan import BudgetError
from lowtide.weights import files


@dataclass(frozen=True)
class SingleFile:
    """A pipeline's file of weights, the folder of its configurations, and one call of it."""

    file: Path
    config: Path
    family: Family

    def by_diffusers(self, **options: Any) -> Family:
        """What diffusers loads from the file, ready to compute, since it leaves T5 as for training.

        Weights are copied: some kernels round otherwise where they are mapped.
        """
        pipe = type(self.family.pipeline).from_single_file(str(self.file), config=str(self.config), **options)
        pipe.set_progress_bar_config(disable=True)
        for module in modules_of(pipe).values():
            for weight in module.eval().parameters():
                weight.data = weight.data.clone()
        return replace(self.family, pipeline=pipe)


def least(model: Any, call: dict[str, Any], **options: Any) -> int:
    """The least `ram` that a model can be loaded within, in bytes: what a budget that is too small is refused with."""
    with pytest.raises(BudgetError) as refusal:
        lowtide.load(model, ram="10MB", **options, **call)
    return refusal.value.minimum.ram


@contextmanager
def reading_no_weights() -> Iterator[None]:
    """While this lasts, it is an error to open a file of weights for more than its header."""

    def opened(*_: Any) -> None:
        raise AssertionError("a file of weights was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.WeightFile, "__init__", opened)
        yield


def written(family: Family, state: dict[str, torch.Tensor], folder: Path) -> SingleFile:
    """The file and the configurations in a folder."""
    config = folder / "config"
    family.pipeline.save_pretrained(str(config))
    for file in config.glob("*/*.safetensors*"):
        file.unlink()
    file = folder / "whole.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
    return SingleFile(file, config, family)


def sdxl() -> Family:
    """SDXL whose two encoders are of two widths, by which diffusers tells them apart."""
    from diffusers import StableDiffusionXLPipeline

    words, width = tokenizers.clip(), 16
    sizes = {"cross_attention_dim": parts.WIDTH + width, "projection_class_embeddings_input_dim": 6 * 8 + width}
    second = parts.clip_text(words, projected=True, seed=1, width=width)
    components = large_parts(text_encoder_2=second, unet=unet(**{**LARGE, **sizes}))
    return family(StableDiffusionXLPipeline(**components), TEXT_CALL, *BLOCKS)


def stable_diffusion_3() -> Family:
    """Stable Diffusion 3 whose two CLIPs are of two widths."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    words, pieces, width = tokenizers.clip(), tokenizers.t5(), 16
    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        joint_attention_dim=2 * parts.WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=parts.WIDTH + width,
        **HEADS,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=ready(network),
        scheduler=parts.flow_scheduler(shift=3.0),
        vae=parts.autoencoder(**PLAIN_LATENTS),
        text_encoder=parts.clip_text(words, projected=True),
        tokenizer=words,
        text_encoder_2=parts.clip_text(words, projected=True, seed=1, width=width),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=parts.t5_text(pieces, d_model=2 * parts.WIDTH),
        tokenizer_3=pieces,
    )
    return family(pipe, {**GUIDED, "max_sequence_length": 24}, "transformer.transformer_blocks")


WHOLE: dict[str, tuple[Callable[[], Family], Callable[[Any], dict[str, torch.Tensor]]]] = {
    "StableDiffusion": (stable_diffusion, original_names.stable_diffusion),
    "SDXL": (sdxl, original_names.sdxl),
    "SD3": (stable_diffusion_3, original_names.stable_diffusion_3),
}
