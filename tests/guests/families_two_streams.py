"""Guests whose denoiser is a transformer with a stream of text beside that of the picture."""

from __future__ import annotations

from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, picture, ready, unevenly

SIZE = {"height": 64, "width": 48}
CALL = {"prompt": PROMPT, "num_inference_steps": 2, **SIZE, "output_type": "pt"}
GUIDED = {**CALL, "negative_prompt": "stars", "guidance_scale": 4.0}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)
"""Channels of a head that turn with the frame, the row and the column."""
BOTH_STREAMS = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
PLAIN_LATENTS = {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


def stable_diffusion_3() -> Family:
    """Stable Diffusion 3: two CLIPs and T5, and blocks of two streams, of which the first has a second attention."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    words, pieces = tokenizers.clip(), tokenizers.t5()
    widths = {"joint_attention_dim": 2 * parts.WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": 48}
    network = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **HEADS,
        **widths,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=ready(network),
        scheduler=parts.flow_scheduler(shift=3.0),
        vae=parts.autoencoder(**PLAIN_LATENTS),
        text_encoder=parts.clip_text(words, projected=True),
        tokenizer=words,
        text_encoder_2=parts.clip_text(words, projected=True, seed=1),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=parts.t5_text(pieces, d_model=2 * parts.WIDTH),
        tokenizer_3=pieces,
    )
    return family(pipe, {**GUIDED, "max_sequence_length": 24}, "transformer.transformer_blocks")


def flux_parts() -> dict[str, Any]:
    """The components of Flux's pipelines."""
    from diffusers import FluxTransformer2DModel

    words, pieces = tokenizers.clip(), tokenizers.t5()
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=AXES,
        **HEADS,
    )
    return {
        "transformer": ready(network),
        "scheduler": parts.flow_scheduler(use_dynamic_shifting=True),
        "vae": parts.autoencoder(**PLAIN_LATENTS),
        "text_encoder": parts.clip_text(words),
        "tokenizer": words,
        "text_encoder_2": parts.t5_text(pieces),
        "tokenizer_2": pieces,
    }


def flux() -> Family:
    """Flux: blocks of two streams, then of one."""
    from diffusers import FluxPipeline

    return family(FluxPipeline(**flux_parts()), {**CALL, "max_sequence_length": 24}, *BOTH_STREAMS)


def flux_from_picture() -> Family:
    """Flux that begins with a picture."""
    from diffusers import FluxImg2ImgPipeline

    call = {**CALL, "max_sequence_length": 24, "image": picture(64, 48), "strength": 0.9, "num_inference_steps": 3}
    return family(FluxImg2ImgPipeline(**flux_parts()), call, *BOTH_STREAMS)


def flux2() -> Family:
    """Flux 2 of the kind Klein: Qwen 3's states of three layers, and modulations that all blocks share.

    Most tests take this one, so its blocks are few.
    """
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    words = tokenizers.qwen()
    levels = {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    vae = AutoencoderKLFlux2(**levels, layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64)
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        joint_attention_dim=3 * parts.WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    )
    pipe = Flux2KleinPipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=unevenly(ready(vae)),
        text_encoder=parts.decoder_only("Qwen3ForCausalLM", words, num_hidden_layers=4),
        tokenizer=words,
        transformer=ready(network),
    )
    call = {**CALL, "guidance_scale": 3.0, "max_sequence_length": 96, "text_encoder_out_layers": (1, 2, 3)}
    return family(pipe, call, *BOTH_STREAMS)


def qwen_image() -> Family:
    """QwenImage: Qwen 2.5's states of a chat, and the autoencoder of videos for one frame."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = tokenizers.qwen()
    text = {
        "vocab_size": len(words),
        "hidden_size": parts.WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": parts.WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]})
    statistics = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.2]}
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **statistics)
    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=parts.WIDTH, axes_dims_rope=AXES, **HEADS
    )
    pipe = QwenImagePipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=ready(vae),
        text_encoder=ready(Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=words,
        transformer=ready(network),
    )
    call = {**CALL, "negative_prompt": "stars", "true_cfg_scale": 3.0, "max_sequence_length": 512}
    return family(pipe, call, "transformer.transformer_blocks")


def chroma() -> Family:
    """Chroma: Flux's blocks, whose modulations one small network approximates for all of them."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    pieces = tokenizers.t5()
    network = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=AXES,
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
        **HEADS,
    )
    pipe = ChromaPipeline(
        scheduler=parts.flow_scheduler(shift=3.0),
        vae=parts.autoencoder(**PLAIN_LATENTS),
        text_encoder=parts.t5_text(pieces),
        tokenizer=pieces,
        transformer=ready(network),
    )
    return family(pipe, {**GUIDED, "max_sequence_length": 24}, *BOTH_STREAMS)


def aura_flow() -> Family:
    """AuraFlow: UMT5, and blocks of two streams, then of one."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    pieces = tokenizers.t5()
    network = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=4,
        joint_attention_dim=parts.WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=256,
        **HEADS,
    )
    pipe = AuraFlowPipeline(
        tokenizer=pieces,
        text_encoder=parts.umt5_text(pieces),
        vae=parts.autoencoder(),
        transformer=ready(network),
        scheduler=parts.flow_scheduler(shift=1.7),
    )
    blocks = ("transformer.joint_transformer_blocks", "transformer.single_transformer_blocks")
    return family(pipe, {**GUIDED, "max_sequence_length": 24}, *blocks)


def hidream() -> Family:
    """HiDream: four text encoders, a state of Llama for each block, and experts among which each token has two.

    The pipeline fits every size to 128x128 latents: here each is one pixel, and a patch has 8x8 of them.
    """
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    words, pieces, letters = tokenizers.clip(), tokenizers.t5(), tokenizers.llama()
    network = HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        caption_channels=[parts.WIDTH, parts.WIDTH],
        text_emb_dim=2 * parts.WIDTH,
        axes_dims_rope=(2, 2, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1, 2, 2, 2],
        num_attention_heads=2,
        attention_head_dim=8,
    )
    pipe = HiDreamImagePipeline(
        scheduler=parts.flow_scheduler(shift=3.0),
        vae=parts.autoencoder(**parts.ONE_LEVEL, **PLAIN_LATENTS),
        text_encoder=parts.clip_text(words, projected=True),
        tokenizer=words,
        text_encoder_2=parts.clip_text(words, projected=True, seed=1),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=parts.t5_text(pieces),
        tokenizer_3=pieces,
        text_encoder_4=parts.decoder_only("LlamaForCausalLM", letters),
        tokenizer_4=letters,
        transformer=ready(network),
    )
    blocks = ("transformer.double_stream_blocks", "transformer.single_stream_blocks")
    return family(pipe, {**GUIDED, "height": 128, "width": 128, "max_sequence_length": 16}, *blocks)


TWO_STREAMS = {
    "SD3": stable_diffusion_3,
    "Flux": flux,
    "Flux img2img": flux_from_picture,
    "Flux2 Klein": flux2,
    "QwenImage": qwen_image,
    "Chroma": chroma,
    "AuraFlow": aura_flow,
    "HiDream": hidream,
}
