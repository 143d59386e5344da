"""Guests that make videos by transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, picture, ready

SIZE = {"height": 64, "width": 48}
CALL = {"prompt": PROMPT, "num_inference_steps": 2, **SIZE, "num_frames": 5, "output_type": "pt"}
GUIDED = {**CALL, "negative_prompt": "stars", "guidance_scale": 4.0, "max_sequence_length": 24}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
BLOCKS = "transformer.transformer_blocks"


def wan_transformer(**changes: Any) -> Any:
    """Wan's transformer, of two blocks."""
    from diffusers import WanTransformer3DModel

    entries = {"in_channels": 4, "out_channels": 4, "text_dim": parts.WIDTH, "freq_dim": 16, "ffn_dim": 48}
    return ready(WanTransformer3DModel(**HEADS, **{**entries, "num_layers": 2, "rope_max_seq_len": 32, **changes}))


def wan_parts(**changes: Any) -> dict[str, Any]:
    """The components of Wan's pipelines: UMT5, a causal autoencoder of videos, and UniPC's steps of flow matching."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    pieces = tokenizers.t5()
    statistics = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.2]}
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **statistics)
    components = {
        "tokenizer": pieces,
        "text_encoder": parts.umt5_text(pieces),
        "vae": ready(vae),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        "transformer": wan_transformer(),
    }
    return {**components, **changes}


def wan() -> Family:
    """Wan 2.1."""
    from diffusers import WanPipeline

    return family(WanPipeline(**wan_parts()), GUIDED, "transformer.blocks")


def wan_of_two() -> Family:
    """Wan 2.2: one transformer for the steps of much noise (the first here), another for those of little."""
    from diffusers import WanPipeline

    second = ready(wan_transformer(), seed=1)
    pipe = WanPipeline(**wan_parts(transformer_2=second, boundary_ratio=0.875))
    return family(pipe, {**GUIDED, "guidance_scale_2": 3.0}, "transformer.blocks", "transformer_2.blocks")


def wan_from_picture() -> Family:
    """Wan 2.1 that begins with a picture, which CLIP reads too."""
    from diffusers import WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan_i2v

    if not hasattr(pipeline_wan_i2v, "ftfy"):  # which the peer mends broken letters with, and does not check for here
        pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)
    network = wan_transformer(in_channels=12, image_dim=parts.WIDTH, added_kv_proj_dim=32)
    eyes = {"image_encoder": parts.clip_vision(projected=False), "image_processor": parts.clip_pictures()}
    pipe = WanImageToVideoPipeline(**wan_parts(transformer=network, **eyes))
    return family(pipe, {**GUIDED, "image": picture(64, 48)}, "transformer.blocks")


def hunyuan_video() -> Family:
    """HunyuanVideo: Llama's states and CLIP's pooled one, blocks of two streams, then of one."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    letters, words = tokenizers.llama(), tokenizers.clip(max_tokens=77)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    network = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        rope_axes_dim=(4, 6, 6),
        **HEADS,
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=parts.decoder_only("LlamaModel", letters, num_hidden_layers=4),
        tokenizer=letters,
        transformer=ready(network),
        vae=ready(vae),
        scheduler=parts.flow_scheduler(shift=7.0),
        text_encoder_2=parts.clip_text(words),
        tokenizer_2=words,
    )
    template = {"template": "the sea at {}", "crop_start": 2}
    call = {**CALL, "guidance_scale": 6.0, "prompt_template": template, "max_sequence_length": 24}
    refiner = "transformer.context_embedder.token_refiner.refiner_blocks"
    return family(pipe, call, BLOCKS, "transformer.single_transformer_blocks", refiner)


def cogvideox_parts(**changes: Any) -> dict[str, Any]:
    """The components of CogVideoX's pipelines, by the peer's own classes."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    pieces = tokenizers.t5()
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    shape = {"sample_width": 6, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 24}
    widths = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": parts.WIDTH, **HEADS}
    network = CogVideoXTransformer3DModel(**{**shape, **widths, "num_layers": 3, **changes})
    return {
        "tokenizer": pieces,
        "text_encoder": parts.t5_text(pieces),
        "vae": ready(vae),
        "transformer": ready(network),
        "scheduler": CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    }


def cogvideox() -> Family:
    """CogVideoX, by the peer's own class."""
    from diffusers import CogVideoXPipeline

    return family(CogVideoXPipeline(**cogvideox_parts()), {**GUIDED, "num_frames": 9}, BLOCKS)


def cogvideox_from_picture() -> Family:
    """CogVideoX that begins with a picture, with rotary positions."""
    from diffusers import CogVideoXImageToVideoPipeline

    components = cogvideox_parts(in_channels=8, use_rotary_positional_embeddings=True)
    call = {**GUIDED, "num_frames": 9, "image": picture(64, 48)}
    return family(CogVideoXImageToVideoPipeline(**components), call, BLOCKS)


def mochi() -> Family:
    """Mochi: wide and narrow streams, and an autoencoder of twelve channels that takes six frames at once."""
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    pieces = tokenizers.t5()
    widths = {"encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32)}
    network = MochiTransformer3DModel(
        num_layers=3, pooled_projection_dim=16, text_embed_dim=parts.WIDTH, time_embed_dim=8, **HEADS
    )
    pipe = MochiPipeline(
        scheduler=parts.flow_scheduler(),
        vae=ready(AutoencoderKLMochi(**widths, layers_per_block=(1, 1, 1, 1, 1)), gain=0.5),
        text_encoder=parts.t5_text(pieces),
        tokenizer=pieces,
        transformer=ready(network),
    )
    return family(pipe, {**GUIDED, "height": 32, "width": 48, "num_frames": 7}, BLOCKS)


VIDEOS = {
    "Wan": wan,
    "Wan of two transformers": wan_of_two,
    "Wan image-to-video": wan_from_picture,
    "HunyuanVideo": hunyuan_video,
    "CogVideoX": cogvideox,
    "CogVideoX image-to-video": cogvideox_from_picture,
    "Mochi": mochi,
}
