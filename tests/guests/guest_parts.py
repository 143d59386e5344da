"""Parts that many guests share: text encoders, an encoder of pictures, and the autoencoder of pictures."""

from __future__ import annotations

from typing import Any

from tests.guests.family import ready

WIDTH = 24
"""Channels of every text encoder's states."""
FOUR_LEVELS = {
    "block_out_channels": [8, 8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""What `autoencoder` takes for latents of eight rows and eight columns of pixels."""
ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "mid_block_add_attention": False,
}
"""What `autoencoder` takes for latents of one pixel."""


def clip_text(tokenizer: Any, *, projected: bool = False, seed: int = 0, width: int = WIDTH) -> Any:
    """CLIP's text encoder, with or without the projection of its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    entries = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    network = CLIPTextModelWithProjection if projected else CLIPTextModel
    return ready(network(CLIPTextConfig(**entries)), seed)


def clip_vision(*, projected: bool = True, **changes: Any) -> Any:
    """CLIP's encoder of pictures of 32x32 pixels, with or without its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    entries = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    network = CLIPVisionModelWithProjection if projected else CLIPVisionModel
    return ready(network(CLIPVisionConfig(**{**entries, **changes})))


def clip_pictures() -> Any:
    """What makes pictures ready for `clip_vision`."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def t5_text(tokenizer: Any, **changes: Any) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return ready(T5EncoderModel(T5Config(**_t5(tokenizer, changes))), gain=0.5)


def umt5_text(tokenizer: Any) -> Any:
    """UMT5's encoder, where every layer has its own table of positions."""
    from transformers import UMT5Config, UMT5EncoderModel

    return ready(UMT5EncoderModel(UMT5Config(**_t5(tokenizer, {}))), gain=0.5)


def _t5(tokenizer: Any, changes: dict[str, Any]) -> dict[str, Any]:
    entries = {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    return {**entries, **changes}


def decoder_only(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """A language model of the named class, whose hidden states guests read: of Llama's shape, or one like it."""
    import transformers

    model = getattr(transformers, kind)
    entries = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return ready(model(model.config_class(**{**entries, **changes})))


def autoencoder(**changes: Any) -> Any:
    """The peer's autoencoder of pictures, of three levels: a latent has four rows and four columns of pixels."""
    from diffusers import AutoencoderKL

    entries = {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 64,
        "scaling_factor": 0.6,
    }
    return ready(AutoencoderKL(**{**entries, **changes}))


def flow_scheduler(**changes: Any) -> Any:
    """The peer's Euler steps of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**changes)


def ddim_scheduler(**changes: Any) -> Any:
    """The peer's DDIM steps with Stable Diffusion's schedule."""
    from diffusers import DDIMScheduler

    entries = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return DDIMScheduler(**{**entries, "clip_sample": False, "set_alpha_to_one": False, **changes})
