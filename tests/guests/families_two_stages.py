"""Guests of two stages, each with a denoiser of its own: a prior makes what the second one draws a picture from."""

from __future__ import annotations

from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import PROMPT, Family, family, ready, unevenly

STEPS = {"num_inference_steps": 2, "prior_num_inference_steps": 2}
CALL = {"prompt": PROMPT, **STEPS, "prior_guidance_scale": 4.0, "output_type": "pt"}


def kandinsky_prior(tokenizer: Any) -> dict[str, Any]:
    """Kandinsky 2.2's prior: CLIP's state of the text becomes one of a picture, step by step."""
    from diffusers import PriorTransformer, UnCLIPScheduler

    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3}
    network = PriorTransformer(**shape, embedding_dim=parts.WIDTH, num_embeddings=tokenizer.model_max_length)
    schedule = {"variance_type": "fixed_small_log", "prediction_type": "sample", "clip_sample_range": 5.0}
    return {
        "prior_prior": ready(network),
        "prior_image_encoder": parts.clip_vision(),
        "prior_text_encoder": parts.clip_text(tokenizer, projected=True),
        "prior_tokenizer": tokenizer,
        "prior_scheduler": UnCLIPScheduler(**schedule, num_train_timesteps=1000),
        "prior_image_processor": parts.clip_pictures(),
    }


def kandinsky() -> Family:
    """Kandinsky 2.2: a prior, then a U-Net that draws the picture of its state; it learns the noise's variance."""
    from diffusers import DDPMScheduler, KandinskyV22CombinedPipeline, UNet2DConditionModel, VQModel

    text = {"cross_attention_dim": parts.WIDTH, "encoder_hid_dim": parts.WIDTH, "encoder_hid_dim_type": "image_proj"}
    network = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        out_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        **text,
    )
    movq = VQModel(
        block_out_channels=(32, 32, 32),  # which it norms in groups of 32
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        norm_type="spatial",
    )
    pipe = KandinskyV22CombinedPipeline(
        unet=ready(network),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range"),
        movq=ready(movq),
        **kandinsky_prior(tokenizers.clip()),
    )
    call = {**CALL, "guidance_scale": 3.0, "height": 64, "width": 48}
    blocks = ("prior_prior.transformer_blocks", "unet.down_blocks", "unet.up_blocks")
    return family(pipe, call, *blocks)


CASCADE = {
    "block_out_channels": (16, 16),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (2, 2),
    "up_num_layers_per_block": (2, 2),
    "timestep_ratio_embedding_dim": 8,
    "clip_text_pooled_in_channels": parts.WIDTH,
    "conditioning_dim": 16,
}


def cascade_prior() -> Any:
    """Stable Cascade's first U-Net: a picture of few large pixels; none of its levels is smaller."""
    from diffusers import StableCascadeUNet

    text = {"clip_text_in_channels": parts.WIDTH, "clip_image_in_channels": parts.WIDTH}
    return ready(StableCascadeUNet(in_channels=4, out_channels=4, switch_level=(False,), **text, **CASCADE))


def cascade_decoder() -> Any:
    """Stable Cascade's second U-Net: latents of ten times as many rows and columns."""
    from diffusers import StableCascadeUNet

    network = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        effnet_in_channels=4,
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        timestep_conditioning_type=("sca",),
        **CASCADE,
    )
    return ready(network)


def stable_cascade() -> Family:
    """Stable Cascade: two U-Nets of the same kind at two sizes, then a network of vectors from a book."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    words = tokenizers.clip()
    book = {"bottleneck_blocks": 1, "embed_dim": 16, "num_vq_embeddings": 16}
    vqgan = PaellaVQModel(**book, scale_factor=0.004)  # random networks leave large latents after few steps
    pipe = StableCascadeCombinedPipeline(
        tokenizer=words,
        text_encoder=parts.clip_text(words, projected=True),
        decoder=cascade_decoder(),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=unevenly(ready(vqgan)),
        prior_prior=cascade_prior(),
        prior_text_encoder=parts.clip_text(words, projected=True, seed=1),
        prior_tokenizer=tokenizers.clip(),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )
    call = {**CALL, "negative_prompt": "stars", "decoder_guidance_scale": 2.0, "height": 128, "width": 96}
    levels = [f"{side}_blocks.{level}" for side in ("down", "up") for level in range(2)]
    blocks = [f"{part}.{level}" for part in ("prior_prior", "decoder") for level in levels]
    reason = "the peer writes that its PaellaVQModel is to be found in `diffusers`, where it has none of that name"
    return family(pipe, call, *blocks, not_saved=reason)


TWO_STAGES = {"Kandinsky 2.2": kandinsky, "StableCascade": stable_cascade}
