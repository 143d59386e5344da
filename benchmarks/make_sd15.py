"""Write a checkpoint with the shapes of Stable Diffusion 1.5, random weights and a made-up vocabulary.

    python benchmarks/make_sd15.py [--out runs/sd15] [--variant fp16|bf16]

Speed and memory do not depend on the values of the weights, so nothing has to be downloaded. The configurations are
those of the published checkpoint (U-Net 859.5 M parameters, autoencoder 83.7 M, text encoder 123.1 M), in the standard
folder layout. Without `--variant` the weights are float32 (4.3 GB). With it, the same values rounded to that dtype are
written beside them (2.1 GB). The seed is fixed, and only one model is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lowtide.configs import write_json
from lowtide.loading.components import save_component
from lowtide.models.mixin import PEER_VERSION
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.schedulers import PNDMScheduler
from lowtide.weights.save import atomic_folder

SEED = 0
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": PEER_VERSION,
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
    "unet": lambda: UNet2DConditionModel.from_config(UNET),
    "vae": lambda: AutoencoderKL.from_config(VAE),
}

VOCABULARY_SIZE = 49408
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sd15"))
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="write the weights in half precision")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(options.out, options.variant)


def write_checkpoint(folder: Path, variant: str | None) -> None:
    """Write every file. If the folder exists, files of other variants stay."""
    with atomic_folder(folder) as target:
        for name in MODELS:
            write_model(name, target / name, variant)
        write_tokenizer(target / "tokenizer")
        PNDMScheduler.from_config(SCHEDULER).save_pretrained(target / "scheduler")
        write_json(target / "model_index.json", MODEL_INDEX)


def write_model(name: str, folder: Path, variant: str | None) -> None:
    """Draw one model's weights from the seed and write them."""
    torch.manual_seed(SEED)
    model = MODELS[name]().requires_grad_(False)
    if variant is not None:
        model.to(VARIANTS[variant])
    save_component(model, folder, variant=variant, max_shard_size=None)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder.name}: {count / 1e6:.1f} M parameters, {variant or 'float32'}", flush=True)


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer files with a vocabulary of CLIP's size and kind, made up instead of published."""
    letters = sorted(ByteLevel.alphabet())
    alphabet = letters + [letter + WORD_END for letter in letters]
    merges = list(islice(possible_merges(), VOCABULARY_SIZE - len(alphabet) - 2))
    entries = [*alphabet, *(left + right for left, right in merges), START, END]
    assert len(set(entries)) == VOCABULARY_SIZE
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": 77}
    folder.mkdir()
    vocabulary = json.dumps({entry: number for number, entry in enumerate(entries)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, **settings, "tokenizer_class": "CLIPTokenizer"})


def possible_merges() -> chain[tuple[str, ...]]:
    """All merges into two letters, then three, then four; each first inside a word, then at its end."""
    ends = [letter + WORD_END for letter in ascii_lowercase]
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    triples = ["".join(triple) for triple in product(ascii_lowercase, repeat=3)]
    heads = (ascii_lowercase, pairs, triples)
    return chain.from_iterable(product(head, tail) for head in heads for tail in (ascii_lowercase, ends))


if __name__ == "__main__":
    main()
