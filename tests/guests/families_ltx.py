"""Guests of the family LTX: videos alone, and videos with sound."""

from __future__ import annotations

from typing import Any

import torch
from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, pictures_of, ready, unevenly

CALL = {"prompt": PROMPT, "negative_prompt": "stars", "num_inference_steps": 2, "num_frames": 5, "output_type": "pt"}
GUIDED = {**CALL, "height": 64, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 24}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
BLOCKS = "transformer.transformer_blocks"


def ltx() -> Family:
    """LTX: the autoencoder halves rows and columns three times, of which once by patches."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    pieces = tokenizers.t5()
    levels = {
        "block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "down_block_types": ("LTXVideoDownBlock3D",) * 3,
        "layers_per_block": (1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False),
        "decoder_spatio_temporal_scaling": (True, True, False),
        "decoder_inject_noise": (False,) * 4,
        "downsample_type": ("conv",) * 3,
        "upsample_residual": (False,) * 3,
        "upsample_factor": (1,) * 3,
    }
    vae = AutoencoderKLLTXVideo(latent_channels=8, patch_size=2, **levels)
    network = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_layers=2, cross_attention_dim=32, caption_channels=parts.WIDTH, **HEADS
    )
    pipe = LTXPipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=unevenly(ready(vae)),
        text_encoder=parts.t5_text(pieces),
        tokenizer=pieces,
        transformer=ready(network),
    )
    return family(pipe, GUIDED, BLOCKS)


def ltx2_text(tokenizer: Any) -> Any:
    """Gemma 3 of text and pictures, whose states of text LTX 2 reads."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": parts.WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "max_position_embeddings": 256,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"image_size": 16, "patch_size": 8, "vision_use_head": False}
    config = Gemma3Config(text_config=text, vision_config={**vision, **shape}, mm_tokens_per_image=4)
    return ready(Gemma3ForConditionalGeneration(config))


def ltx2_transformer() -> Any:
    """LTX 2's transformer: a stream of frames and one of sound, which read each other."""
    from diffusers import LTX2VideoTransformer3DModel

    sound = {
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
    }
    network = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        cross_attention_dim=32,
        vae_scale_factors=(4, 8, 8),
        num_layers=3,
        caption_channels=parts.WIDTH,
        perturbed_attn=True,
        **sound,
        **HEADS,
    )
    return ready(network)


def ltx2_autoencoders() -> dict[str, Any]:
    """LTX 2's autoencoders of frames and of sound, and the vocoder that makes waves of the latter's spectra."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    levels = {
        "block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 16),
        "down_block_types": ("LTX2VideoDownBlock3D",) * 3,
        "layers_per_block": (1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True, False),
        "decoder_spatio_temporal_scaling": (True, True),
        "decoder_inject_noise": (False,) * 3,
        "downsample_type": ("spatiotemporal",) * 3,
        "upsample_type": ("spatiotemporal",) * 2,
        "upsample_residual": (True,) * 2,
        "upsample_factor": (2,) * 2,
    }
    audio = {"base_channels": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 16}
    ups = {"upsample_kernel_sizes": [8, 4], "upsample_factors": [4, 2]}
    resnets = {"resnet_kernel_sizes": [3, 5], "resnet_dilations": [[1, 3], [1, 3]]}
    return {
        "vae": unevenly(ready(AutoencoderKLLTX2Video(latent_channels=8, patch_size=2, **levels))),
        "audio_vae": unevenly(ready(AutoencoderKLLTX2Audio(**audio))),
        "vocoder": ready(LTX2Vocoder(in_channels=32, hidden_channels=16, **ups, **resnets)),
    }


def ltx2_connectors() -> Any:
    """Two small transformers that turn the states of all of Gemma's layers into text for frames and for sound."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    heads = {"connector_num_attention_heads": 2, "connector_attention_head_dim": parts.WIDTH // 2}
    each = {**heads, "connector_num_learnable_registers": 8}
    both = {f"{kind}_{name}": value for kind in ("video", "audio") for name, value in each.items()}
    return ready(LTX2TextConnectors(caption_channels=parts.WIDTH, text_proj_in_factor=4, **both))


def with_sound(output: Any) -> torch.Tensor:
    """Frames and sound of LTX 2, as one row of numbers."""
    return torch.cat([pictures_of(output).flatten(), output.audio.flatten()])


def ltx2() -> Family:
    """LTX 2: frames with their sound, guided by the text, by a block left out, and by each other."""
    from diffusers import LTX2Pipeline

    words = tokenizers.gemma()
    pipe = LTX2Pipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        text_encoder=ltx2_text(words),
        tokenizer=words,
        connectors=ltx2_connectors(),
        transformer=ltx2_transformer(),
        **ltx2_autoencoders(),
    )
    call = {**GUIDED, "num_frames": 9, "spatio_temporal_guidance_blocks": [1]}
    return family(pipe, call, BLOCKS, result=with_sound)


LTX = {"LTX": ltx, "LTX2": ltx2}
