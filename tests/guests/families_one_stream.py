"""Guests whose denoiser is a transformer with one stream: text within it, or read by cross attention."""

from __future__ import annotations

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, ready

SIZE = {"height": 64, "width": 48}
CALL = {"prompt": PROMPT, "negative_prompt": "stars", "num_inference_steps": 2, "output_type": "pt"}
GUIDED = {**CALL, **SIZE, "guidance_scale": 4.0}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
PLAIN_LATENTS = {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


def z_image() -> Family:
    """ZImage: text and picture in one stream, after refiners of each."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    words = tokenizers.qwen()
    network = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    pipe = ZImagePipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=parts.autoencoder(**PLAIN_LATENTS),
        text_encoder=parts.decoder_only("Qwen3Model", words),
        tokenizer=words,
        transformer=ready(network),
    )
    refiners = ("transformer.noise_refiner", "transformer.context_refiner")
    return family(pipe, {**GUIDED, "max_sequence_length": 96}, "transformer.layers", *refiners)


def pixart_sigma() -> Family:
    """PixArt Sigma: one modulation for all blocks, and T5 by cross attention."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    pieces = tokenizers.t5()
    network = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=parts.WIDTH,
        use_additional_conditions=False,
        **HEADS,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=pieces,
        text_encoder=parts.t5_text(pieces),
        vae=parts.autoencoder(),
        transformer=ready(network),
        scheduler=parts.ddim_scheduler(),
    )
    plain = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    return family(pipe, {**GUIDED, **plain}, "transformer.transformer_blocks")


def sana() -> Family:
    """Sana: linear attention, Gemma 2, and the autoencoder DC-AE."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    words = tokenizers.gemma()
    levels = {
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,)),
    }
    vae = AutoencoderDC(**levels, latent_channels=4, attention_head_dim=8, scaling_factor=0.6)
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=parts.WIDTH,
        sample_size=16,
        **HEADS,
    )
    pipe = SanaPipeline(
        tokenizer=words,
        text_encoder=parts.decoder_only("Gemma2Model", words),
        vae=ready(vae),
        transformer=ready(network),
        scheduler=parts.flow_scheduler(shift=3.0),
    )
    plain = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 48}
    return family(pipe, {**GUIDED, **plain, "width": 32}, "transformer.transformer_blocks")


def lumina2() -> Family:
    """Lumina 2: text and picture in one stream, after refiners of each; keys of fewer heads than queries."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    words = tokenizers.gemma()
    network = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(128, 32, 32),
        cap_feat_dim=parts.WIDTH,
    )
    pipe = Lumina2Pipeline(
        transformer=ready(network),
        scheduler=parts.flow_scheduler(shift=3.0),
        vae=parts.autoencoder(**parts.FOUR_LEVELS, **PLAIN_LATENTS),  # eight pixels a latent, as the pipeline assumes
        text_encoder=parts.decoder_only("Gemma2Model", words),
        tokenizer=words,
    )
    call = {**GUIDED, "system_prompt": "a sea", "max_sequence_length": 64}
    refiners = ("transformer.noise_refiner", "transformer.context_refiner")
    return family(pipe, call, "transformer.layers", *refiners)


def cogview4() -> Family:
    """CogView 4: GLM's states, and blocks where text and picture share one attention."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    letters = tokenizers.llama()
    network = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        text_embed_dim=parts.WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
        **HEADS,
    )
    pipe = CogView4Pipeline(
        tokenizer=letters,
        text_encoder=parts.decoder_only("GlmModel", letters),
        vae=parts.autoencoder(),
        transformer=ready(network),
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )
    return family(pipe, {**GUIDED, "max_sequence_length": 64}, "transformer.transformer_blocks")


def dit() -> Family:
    """DiT: pictures of numbered classes, no text (class 1000 is none)."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(out_channels=8, num_layers=3, sample_size=12, **HEADS)
    pipe = DiTPipeline(ready(network), parts.autoencoder(), parts.ddim_scheduler())
    call = {"class_labels": [3], "guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "np"}
    return family(pipe, call, "transformer.transformer_blocks")


ONE_STREAM = {
    "ZImage": z_image,
    "PixArtSigma": pixart_sigma,
    "Sana": sana,
    "Lumina2": lumina2,
    "CogView4": cogview4,
    "DiT": dit,
}
