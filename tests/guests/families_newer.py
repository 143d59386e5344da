"""Guests that are newer than the others: those that took a new way through planning or loading."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests import seeing_parts as seeing
from tests.guests.families_ltx import ltx2, with_sound
from tests.guests.families_two_streams import flux_parts
from tests.guests.families_videos import hunyuan_video, wan_parts
from tests.guests.family import PROMPT, Family, family, picture, ready, unevenly

SIZE = {"height": 64, "width": 48}
CALL = {"prompt": PROMPT, "num_inference_steps": 2, **SIZE, "output_type": "pt"}
CLIP = {**CALL, "negative_prompt": "stars", "num_frames": 5, "guidance_scale": 4.0, "max_sequence_length": 24}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = (4, 6, 6)
STATISTICS = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.2]}
LEVELS = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **STATISTICS}
WAN = {"text_dim": parts.WIDTH, "freq_dim": 16, "ffn_dim": 48, "rope_max_seq_len": 32, **HEADS}
BLOCKS = "transformer.transformer_blocks"
BOTH_STREAMS = (BLOCKS, "transformer.single_transformer_blocks")


def krea2() -> Family:
    """Krea 2: states of several of Qwen 3's layers, which the folder's index lists by number."""
    from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

    words = seeing.words_and_pictures()
    text = {"num_text_layers": 3, "text_hidden_dim": parts.WIDTH, "text_intermediate_size": 48}
    heads = {"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "num_key_value_heads": 1}
    network = Krea2Transformer2DModel(
        in_channels=16, num_layers=3, intermediate_size=48, timestep_embed_dim=16, axes_dims_rope=AXES,
        num_layerwise_text_blocks=1, **text, **heads, **HEADS
    )  # fmt: skip
    pipe = Krea2Pipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=ready(AutoencoderKLQwenImage(**LEVELS)),
        text_encoder=seeing.qwen3_vl(words),
        tokenizer=words,
        transformer=ready(network),
        text_encoder_select_layers=(1, 2, 3),
    )
    return family(pipe, {**CALL, "guidance_scale": 3.0, "max_sequence_length": 64}, BLOCKS)


def flux2_autoencoder() -> Any:
    """FLUX.2's autoencoder, with statistics of its latents."""
    from diffusers import AutoencoderKLFlux2

    levels = {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    shape = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
    return unevenly(ready(AutoencoderKLFlux2(**levels, **shape)))


def ideogram4() -> Family:
    """Ideogram 4: two denoisers in each step, and a text encoder whose layers are called one by one from outside."""
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

    words = seeing.words_and_pictures()

    def network(seed: int) -> Any:
        widths = {"intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 13 * parts.WIDTH}
        made = Ideogram4Transformer2DModel(in_channels=16, num_layers=3, mrope_section=(4, 2, 2), **widths, **HEADS)
        return ready(made, seed)

    pipe = Ideogram4Pipeline(
        scheduler=parts.flow_scheduler(),
        vae=flux2_autoencoder(),
        text_encoder=seeing.qwen3_vl(words, num_hidden_layers=36),  # the pipeline reads states up to the last of 36
        tokenizer=words,
        transformer=network(0),
        unconditional_transformer=network(1),
    )
    call = {**CALL, "guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": 64}
    return family(pipe, call, "transformer.layers", "unconditional_transformer.layers")


def flux2_dev() -> Family:
    """FLUX.2 that begins with a picture, with the states of Mistral 3."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    words = seeing.words_and_pictures()
    shape = {"num_layers": 3, "num_single_layers": 4, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": True}
    text = {"joint_attention_dim": 3 * parts.WIDTH, "timestep_guidance_channels": 16}
    network = Flux2Transformer2DModel(in_channels=16, **shape, **text, **HEADS)
    pipe = Flux2Pipeline(
        scheduler=parts.flow_scheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=seeing.mistral3(words),
        tokenizer=words,
        transformer=ready(network),
    )
    layers = {"max_sequence_length": 96, "text_encoder_out_layers": (1, 2, 3)}
    return family(pipe, {**CALL, **layers, "guidance_scale": 3.0, "image": picture(64, 64)}, *BOTH_STREAMS)


def flux_kontext() -> Family:
    """FLUX.1 Kontext: the tokens of a picture to be changed beside those of the new one."""
    from diffusers import FluxKontextPipeline

    call = {**CALL, "max_sequence_length": 24, "image": picture(64, 48), "max_area": 64 * 48, "_auto_resize": False}
    return family(FluxKontextPipeline(**flux_parts()), call, *BOTH_STREAMS)


def kandinsky5() -> Family:
    """Kandinsky 5: what it calls its tokenizer is a processor, which takes pictures first."""
    from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    words, clip = seeing.words_and_pictures(), tokenizers.clip(max_tokens=77)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    widths = {"in_text_dim": parts.WIDTH, "in_text_dim2": parts.WIDTH, "time_dim": 16, "model_dim": 32, "ff_dim": 48}
    network = Kandinsky5Transformer3DModel(
        num_text_blocks=2, num_visual_blocks=3, axes_dims=AXES, visual_cond=True, **widths
    )
    pipe = Kandinsky5T2VPipeline(
        transformer=ready(network),
        vae=ready(vae),
        text_encoder=seeing.qwen2_5_vl(words),
        tokenizer=seeing.Processor(words),
        text_encoder_2=parts.clip_text(clip),
        tokenizer_2=clip,
        scheduler=parts.flow_scheduler(shift=5.0),
    )
    blocks = ("transformer.visual_transformer_blocks", "transformer.text_transformer_blocks")
    call = {**CLIP, "max_sequence_length": 64}
    return family(pipe, call, *blocks, not_saved="the processor is a stand-in, which the peer cannot find again")


def framepack() -> Family:
    """HunyuanVideo by Framepack: latents of earlier frames in coarser patches, at positions of their own."""
    from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel

    beside = hunyuan_video()
    widths = {"text_embed_dim": parts.WIDTH, "pooled_projection_dim": parts.WIDTH, "image_proj_dim": parts.WIDTH}
    depth = {"num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 2}
    network = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, rope_axes_dim=AXES, has_image_proj=True, has_clean_x_embedder=True,
        **depth, **widths, **HEADS
    )  # fmt: skip
    components = {**beside.pipeline.components, **seeing.siglip(), "transformer": ready(network)}
    call = {**beside.call, "image": picture(64, 48), "latent_window_size": 3, "num_frames": 9}
    return family(HunyuanVideoFramepackPipeline(**components), call, *BOTH_STREAMS)


def wan_vace() -> Family:
    """Wan VACE: blocks of a clip, its mask and a picture beside the others."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel
    from diffusers.pipelines.wan import pipeline_wan_vace

    _without_ftfy(pipeline_wan_vace)
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 72}
    pipe = WanVACEPipeline(**wan_parts(transformer=ready(WanVACETransformer3DModel(**shape, **WAN))))
    frames = [picture(64, 48, seed) for seed in range(5)]
    shown = {"video": frames, "mask": [frames[0].convert("L")] * 5, "reference_images": [picture(64, 48, 7)]}
    return family(pipe, {**CLIP, **shown}, "transformer.blocks", "transformer.vace_blocks")


def wan_of_both() -> Family:
    """Wan 2.2 of 5 billion weights: a step for each token, and an autoencoder of patches with shortcuts."""
    from diffusers import AutoencoderKLWan, WanPipeline

    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(**LEVELS, **patches, decoder_base_dim=8, is_residual=True)
    pipe = WanPipeline(**wan_parts(vae=ready(vae), expand_timesteps=True))
    return family(pipe, {**CLIP, "width": 64}, "transformer.blocks")


def ltx2_3() -> Family:
    """LTX 2.3: gated attention, modulated text, and a vocoder that widens its own sound."""
    from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2VocoderWithBWE

    beside = ltx2()
    sound = {"channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    audio = {f"audio_{name}": value for name, value in sound.items() if name != "channels"}
    gates = {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True}
    network = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, audio_in_channels=8, audio_out_channels=8, cross_attention_dim=32,
        vae_scale_factors=(4, 8, 8), num_layers=3, perturbed_attn=True, use_prompt_embeddings=False, rope_type="split",
        **gates, **audio, **HEADS
    )  # fmt: skip
    each = {"connector_num_attention_heads": 2, "connector_num_learnable_registers": 8, "gated_attn": True}
    both = {f"{kind}_{name}": value for kind in ("video", "audio") for name, value in each.items()}
    heads = {"video_connector_attention_head_dim": 16, "audio_connector_attention_head_dim": 8}
    outputs = {"per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16, "proj_bias": True}
    connectors = LTX2TextConnectors(
        caption_channels=parts.WIDTH, text_proj_in_factor=4, rope_type="split", **both, **heads, **outputs
    )
    first = {"upsample_kernel_sizes": [8, 4], "upsample_factors": [4, 2], "resnet_kernel_sizes": [3, 5],
        "resnet_dilations": [[1, 3], [1, 3]]}  # fmt: skip
    second = {"bwe_upsample_kernel_sizes": [12, 4], "bwe_upsample_factors": [6, 4], "bwe_resnet_kernel_sizes": [3],
        "bwe_resnet_dilations": [[1, 3]], "bwe_hidden_channels": 16, "bwe_in_channels": 32}  # fmt: skip
    spectra = {"filter_length": 32, "hop_length": 8, "window_length": 32, "num_mel_channels": 16}
    vocoder = LTX2VocoderWithBWE(in_channels=32, hidden_channels=16, **first, **second, **spectra)
    newer = {"transformer": ready(network), "connectors": ready(connectors), "vocoder": ready(vocoder)}
    pipe = LTX2Pipeline(**{**beside.pipeline.components, **newer})
    return family(pipe, beside.call, BLOCKS, result=with_sound)


def _without_ftfy(module: Any) -> None:
    """Let a pipeline of the peer's run without ftfy, which mends broken letters and is not checked for there."""
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)


NEWER = {
    "Krea2": krea2,
    "Ideogram4": ideogram4,
    "Flux2 dev": flux2_dev,
    "Flux Kontext": flux_kontext,
    "Kandinsky 5": kandinsky5,
    "Framepack": framepack,
    "Wan VACE": wan_vace,
    "Wan of text and pictures": wan_of_both,
    "LTX 2.3": ltx2_3,
}
