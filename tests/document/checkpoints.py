"""Checkpoints of Stable Diffusion for the document's scripts: tiny ones, and one of version 1.5's shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import tiny
from tests.document.processes import ROOT, environment

from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.tokenizers import CLIPTokenizer
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

SHIPPED = ROOT / "src" / "lowtide" / "assets" / "seascapes"
TOKENS, TEXT_WIDTH = 77, 768
"""Of Stable Diffusion 1.5's text: the tracing script has them written into its inputs."""
VAE_CHANNELS = [4, 4, 8, 8]
"""Four levels, so that a latent is eight pixels wide, as in the published model."""


def write_tiny(folder: Path, channels: list[int]) -> Path:
    """A checkpoint for pictures of 64x64 pixels, with attention at the U-Net's coarsest level alone.

    Self-attention at the finest level would need the square of 133 440 tokens for the document's largest picture.
    """
    tiny.write_tokenizer(folder / "words")
    words = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=TOKENS)
    pipe = StableDiffusionPipeline(
        vae=_vae(), text_encoder=_text_encoder(len(words)), tokenizer=words, unet=_unet(channels),
        scheduler=tiny.scheduler("PNDMScheduler"),
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def _unet(channels: list[int]) -> UNet2DConditionModel:
    plain = len(channels) - 1
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "block_out_channels": channels,
        "down_block_types": ["DownBlock2D"] * plain + ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * plain,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return tiny.set_weights(UNet2DConditionModel.from_config(config))


def _vae() -> AutoencoderKL:
    levels = len(VAE_CHANNELS)
    config = {
        "block_out_channels": VAE_CHANNELS,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
        "scaling_factor": 0.6,
    }
    return tiny.set_weights(AutoencoderKL.from_config(config))


def _text_encoder(vocabulary: int) -> CLIPTextModel:
    config = {
        "hidden_size": TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
    }
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return tiny.set_weights(CLIPTextModel.from_config({**config, **ids, "vocab_size": vocabulary}))


def write_sd15(folder: Path) -> Path:
    """Random weights with the shapes of Stable Diffusion 1.5, 4.3 GB; the one in `runs/` is taken if it is there.

    `LOWTIDE_SD15` may name another folder that holds it.
    """
    for known in (os.environ.get("LOWTIDE_SD15"), ROOT / "runs" / "sd15"):
        if known and (Path(known) / "model_index.json").is_file():
            return Path(known)
    command = [sys.executable, str(ROOT / "benchmarks" / "make_sd15.py"), "--out", str(folder / "sd15")]
    subprocess.run(command, env=environment(), check=True)
    return folder / "sd15"
