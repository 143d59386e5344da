"""Guests whose denoiser is a U-Net: Stable Diffusion's relatives, with pictures, masks, controls and motion."""

from __future__ import annotations

from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, picture, ready

SIZE = {"height": 64, "width": 48}
CALL = {"prompt": PROMPT, "negative_prompt": "stars", "num_inference_steps": 2, "guidance_scale": 5.0}
TEXT_CALL = {**CALL, **SIZE, "output_type": "pt"}
NETWORK = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": parts.WIDTH,
}
LARGE = {
    "cross_attention_dim": 2 * parts.WIDTH,
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + parts.WIDTH,
}
"""What SDXL has otherwise: two text encoders, several transformer blocks in a row, and the picture's size given."""
BLOCKS = ("unet.down_blocks", "unet.up_blocks")


def unet(**changes: Any) -> Any:
    """The peer's U-Net, of three levels."""
    from diffusers import UNet2DConditionModel

    ups = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    return ready(UNet2DConditionModel(**{**NETWORK, "up_block_types": ups, "sample_size": 16, **changes}))


def controlnet(**changes: Any) -> Any:
    """The peer's ControlNet for `unet`; two of its four convolutions of the control halve it."""
    from diffusers import ControlNetModel

    entries = {**NETWORK, "conditioning_embedding_out_channels": (4, 8, 8), **changes}
    return ready(ControlNetModel(**entries))


def small_parts(**changes: Any) -> dict[str, Any]:
    """The components of Stable Diffusion's pipelines."""
    words = tokenizers.clip()
    components = {
        "vae": parts.autoencoder(),
        "text_encoder": parts.clip_text(words),
        "tokenizer": words,
        "unet": unet(),
    }
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {**components, "scheduler": parts.ddim_scheduler(), **nothing, **changes}


def large_parts(**changes: Any) -> dict[str, Any]:
    """The components of SDXL's pipelines."""
    words = tokenizers.clip()
    components = {
        "vae": parts.autoencoder(force_upcast=False),
        "text_encoder": parts.clip_text(words),
        "text_encoder_2": parts.clip_text(words, projected=True, seed=1),
        "tokenizer": words,
        "tokenizer_2": tokenizers.clip(),
        "unet": unet(**LARGE),
        "scheduler": parts.ddim_scheduler(),
    }
    return {**components, **changes}


def stable_diffusion() -> Family:
    """Stable Diffusion, by the peer's own class."""
    from diffusers import StableDiffusionPipeline

    return family(StableDiffusionPipeline(**small_parts()), TEXT_CALL, *BLOCKS)


def inpaint() -> Family:
    """Stable Diffusion that fills a mask: nine channels go into the U-Net."""
    from diffusers import StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline(**small_parts(unet=unet(in_channels=9)))
    pictures = {"image": picture(64, 48), "mask_image": picture(64, 48, seed=1).convert("L")}
    return family(pipe, {**TEXT_CALL, **pictures}, *BLOCKS)


def control() -> Family:
    """Stable Diffusion with a ControlNet."""
    from diffusers import StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline(**small_parts(controlnet=controlnet()))
    return family(pipe, {**TEXT_CALL, "image": picture(64, 48)}, *BLOCKS, "controlnet.down_blocks")


def sdxl() -> Family:
    """SDXL."""
    from diffusers import StableDiffusionXLPipeline

    return family(StableDiffusionXLPipeline(**large_parts()), TEXT_CALL, *BLOCKS)


def sdxl_from_picture() -> Family:
    """SDXL that begins with a picture."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    call = {**CALL, "image": picture(64, 48), "strength": 0.9, "num_inference_steps": 3, "output_type": "pt"}
    return family(StableDiffusionXLImg2ImgPipeline(**large_parts()), call, *BLOCKS)


def sdxl_control() -> Family:
    """SDXL with a ControlNet."""
    from diffusers import StableDiffusionXLControlNetPipeline

    pipe = StableDiffusionXLControlNetPipeline(**large_parts(controlnet=controlnet(**LARGE)))
    return family(pipe, {**TEXT_CALL, "image": picture(64, 48)}, *BLOCKS, "controlnet.down_blocks")


def animatediff() -> Family:
    """AnimateDiff: Stable Diffusion's U-Net with layers of motion between its own."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    widths = NETWORK["block_out_channels"]
    motion = {"motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    adapter = ready(MotionAdapter(widths, **motion, use_motion_mid_block=False))
    components = small_parts(motion_adapter=adapter)
    del components["safety_checker"], components["requires_safety_checker"]
    call = {**CALL, "num_frames": 3, "height": 32, "width": 48, "output_type": "pt"}
    return family(AnimateDiffPipeline(**components), call, *BLOCKS)


def marigold() -> Family:
    """Marigold: the depth of a picture, denoised beside it by Stable Diffusion's U-Net."""
    from diffusers import MarigoldDepthPipeline

    components = small_parts(unet=unet(in_channels=8), prediction_type="depth")
    del components["safety_checker"], components["requires_safety_checker"], components["feature_extractor"]
    call = {"image": picture(64, 48), "num_inference_steps": 2, "processing_resolution": 64, "output_type": "np"}
    return family(MarigoldDepthPipeline(**components), call, *BLOCKS)


def ddpm() -> Family:
    """DDPM: pixels denoised by a U-Net, no text and no autoencoder."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    kinds = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    shape = {"sample_size": 32, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    pipe = DDPMPipeline(ready(UNet2DModel(**kinds, **shape, attention_head_dim=8)), DDPMScheduler())
    return family(pipe, {"num_inference_steps": 3, "output_type": "np"}, *BLOCKS)


def stable_video() -> Family:
    """Stable Video Diffusion: a picture moves; layers of space and of time take turns in the U-Net."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    network = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),  # which it norms in groups of 32
        down_block_types=["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        up_block_types=["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
        num_attention_heads=(2, 2),
        layers_per_block=1,
        cross_attention_dim=parts.WIDTH,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1
    )
    pipe = StableVideoDiffusionPipeline(
        vae=ready(vae),
        image_encoder=parts.clip_vision(image_size=224, patch_size=32),  # the pipeline makes pictures this large
        unet=ready(network),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=parts.clip_pictures(),
    )
    shape = {"height": 32, "width": 48, "num_frames": 3, "num_inference_steps": 2, "output_type": "pt"}
    return family(pipe, {**shape, "image": picture(32, 48)}, *BLOCKS)


UNETS = {
    "StableDiffusion": stable_diffusion,
    "SD inpaint": inpaint,
    "SD ControlNet": control,
    "SDXL": sdxl,
    "SDXL img2img": sdxl_from_picture,
    "SDXL ControlNet": sdxl_control,
    "AnimateDiff": animatediff,
    "Stable Video Diffusion": stable_video,
    "Marigold depth": marigold,
    "DDPM": ddpm,
}
