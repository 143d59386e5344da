"""Tiny models and pipelines: published configurations in small, weights by a recipe that no release of torch changes.

The weights are uniform numbers hashed from each tensor's name, so ours, the peer's and the goldens' are the same.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import nn

from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.image_processor import CLIPImageProcessor
from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.models.tokenizers import CLIPTokenizer
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_positions import rotary_embedding
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.schedulers import SCHEDULERS as ALL_SCHEDULERS

CACHED = 2**16
"""Numbers of the largest tensors that are kept once they were made."""
MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}

# Those for pictures; CogVideoX's are for videos.
SCHEDULERS = {name: cls for name, cls in ALL_SCHEDULERS.items() if not name.startswith("CogVideoX")}

UNETS = {
    "sd1": {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16, 24],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    },
    "sd2": {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16, 24],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": [1, 2, 4, 6],
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "only_cross_attention": False,
        "upcast_attention": False,
    },
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": [2, 4, 6],
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
}
FEW_BLOCKS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
"""Of a U-Net with each kind of block once: rules, plans, traces and files take their time for each module."""
VAE = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.6,
}
VAES = {
    "sd1": VAE,
    "four levels": {
        **VAE,
        "block_out_channels": [8, 8, 12, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "no quant convs": {**VAE, "use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 6},
    "no mid attention": {**VAE, "mid_block_add_attention": False},
}
VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 12,
    "text_embed_dim": 24,
    "num_layers": 3,
    "sample_height": 8,
    "sample_width": 12,
    "sample_frames": 9,
    "max_text_seq_length": 7,
}
TRANSFORMERS = {
    "2b": VIDEO,
    "5b": {**VIDEO, "use_rotary_positional_embeddings": True},
    "1.5": {**VIDEO, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    "picture": {
        **VIDEO,
        "in_channels": 8,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    "picture 1.5": {
        **VIDEO,
        "in_channels": 8,
        "ofs_embed_dim": 12,
        "patch_size_t": 2,
        "use_rotary_positional_embeddings": True,
    },
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 24,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def numbers(shape, seed=0):
    """Uniform numbers in [-1, 1), exact in fp32 and the same everywhere (splitmix64; Steele et al. 2014, fig. 17)."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed * 2**24)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    values = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def set_weights(module: nn.Module, seed=0):
    """Give every parameter its numbers, from its name and `seed`; returns the module, ready to compute."""
    state = module.state_dict()
    module.load_state_dict({name: _weight(name, tensor, seed) for name, tensor in state.items()})
    return module.eval().requires_grad_(False)


def _weight(name, tensor, seed):
    if not tensor.is_floating_point():
        return tensor
    of_shape = _weight_of if tensor.numel() <= CACHED else _weight_of.__wrapped__
    return of_shape(name, tuple(tensor.shape), seed)


@functools.cache
def _weight_of(name, shape, seed):
    name = name.removeprefix("text_model.").replace("vision_model.vision_model.", "vision_model.")
    values = numbers(shape, zlib.crc32(name.encode()) % 2**20 + seed)
    if "embedding.weight" in name or name in ("concept_embeds", "special_care_embeds"):
        return values
    if values.ndim > 1:
        return values * (3 / values[0].numel()) ** 0.5  # of variance one over the fan-in
    return 1 + 0.3 * values if name.endswith("weight") else 0.2 * values


def unet(kind="sd1", **changes):
    """Our U-Net, ready to compute."""
    return set_weights(UNet2DConditionModel.from_config({**UNETS[kind], **changes}))


def vae(kind="sd1", **changes):
    """Our autoencoder, ready to compute."""
    return set_weights(AutoencoderKL.from_config({**VAES[kind], **changes}))


def unet_inputs(kind="sd1", size=(8, 8), batch=2):
    """Latents, a timestep, text embeddings, and for SDXL the added conditions."""
    inputs = {
        "sample": 1.7 * numbers((batch, 4, *size), 1),
        "timestep": torch.tensor(481),
        "encoder_hidden_states": 1.7 * numbers((batch, 7, UNETS[kind]["cross_attention_dim"]), 2),
    }
    if kind == "sdxl":
        ids = torch.tensor([[64.0, 48, 3, 5, 80, 72]]).repeat(batch, 1) + torch.arange(batch)[:, None]
        inputs["added_cond_kwargs"] = {"text_embeds": numbers((batch, 10), 3), "time_ids": ids}
    return inputs


def video_transformer(kind="5b", **changes):
    """Our video transformer, ready to compute."""
    return set_weights(CogVideoXTransformer3DModel.from_config({**TRANSFORMERS[kind], **changes}))


def video_inputs(kind="5b", size=(3, 8, 12), batch=2, config=None):
    """Latents of so many frames, rows and columns, timesteps, text embeddings, and rotary positions where needed."""
    config = config or CogVideoXTransformer3DModel.config_class.from_dict(TRANSFORMERS[kind])
    frames, height, width = size
    frames += frames % (config.patch_size_t or 1)
    inputs = {
        "hidden_states": 1.7 * numbers((batch, frames, config.in_channels, height, width), 1),
        "encoder_hidden_states": 1.7 * numbers((batch, config.max_text_seq_length, config.text_embed_dim), 2),
        "timestep": torch.tensor([481, 17, 900])[:batch],
    }
    if config.use_rotary_positional_embeddings:
        inputs["image_rotary_emb"] = rotary_embedding(config, height, width, frames)
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = torch.tensor([2.0])
    return inputs


def write_tokenizer(folder: Path):
    """Write the files of a CLIP tokenizer that knows single bytes and four merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "e"), ("se", "a</w>"), ("b", "o"), ("r", "e")]
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {**special, "model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def tokenizer(folder: Path):
    """A CLIP tokenizer; `folder` keeps its files."""
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(vocabulary=518):
    """A CLIP text encoder for `tokenizer`, ready to compute."""
    ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return set_weights(CLIPTextModel.from_config({**TEXT, **ids, "vocab_size": vocabulary}))


def safety_config():
    """The configuration of a tiny safety checker."""
    text = {**TEXT, "vocab_size": 518, "bos_token_id": 516, "eos_token_id": 517}
    return {"vision_config": VISION, "text_config": text, "projection_dim": 6}


def safety_checker(threshold=0.7, make=StableDiffusionSafetyChecker.from_config):
    """A safety checker, ready to compute: of 17 random concepts in few dimensions, some are near to some pictures."""
    checker = set_weights(make(safety_config()))
    with torch.no_grad():
        checker.concept_embeds_weights.copy_(threshold + 0.05 * numbers((17,), 5))
        checker.special_care_embeds_weights.copy_(threshold + 0.05 * numbers((3,), 6))
    return checker


def image_processor(folder: Path):
    """A CLIP image processor for `safety_checker`; `folder` keeps its file."""
    folder.mkdir(parents=True, exist_ok=True)
    size = VISION["image_size"]
    config = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    config["crop_size"] = {"height": size, "width": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPImageProcessor.from_pretrained(folder)


def scheduler(name="DDIMScheduler", **changes):
    """One of our schedulers, with Stable Diffusion's schedule."""
    own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return ALL_SCHEDULERS[name].from_config({**SCHEDULE, **own, **changes})


def pipeline(folder: Path, *, checker=False, schedule=None, **models):
    """Our pipeline of tiny parts, with few blocks, 32x32 pixels by default; `folder` keeps the vocabulary."""
    words = tokenizer(folder / "tokenizer")
    parts = {
        "vae": vae(),
        "unet": unet(**FEW_BLOCKS),
        "text_encoder": text_encoder(len(words)),
        "safety_checker": safety_checker() if checker else None,
        "feature_extractor": image_processor(folder / "feature_extractor") if checker else None,
    }
    pipe = StableDiffusionPipeline(tokenizer=words, scheduler=schedule or scheduler(), **{**parts, **models})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    """One CPU generator, or a list of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(seeds) == 1 else generators


def difference(ours, theirs):
    """The largest error, relative to the largest entry."""
    ours, theirs = (torch.as_tensor(one).double() for one in (ours, theirs))
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert ours.isfinite().all(), "NaN or infinity"
    assert theirs.isfinite().all(), "NaN or infinity"
    return float((ours - theirs).abs().max() / theirs.abs().max())


def mapped_files(module: nn.Module):
    """What Linux maps where the parameters lie: files by their paths, and other memory by its own names."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[5] if len(line) > 5 else "") for line in lines]
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    return {name for start, end, name in spans if any(start <= address < end for address in addresses)}
