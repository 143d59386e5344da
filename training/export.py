"""Write the trained networks as a checkpoint in the standard layout, in half precision."""

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from lowtide.configs import Config
from lowtide.models.vae import AutoencoderKL
from lowtide.models.vae_config import AutoencoderKLConfig
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.schedulers import DDIMConfig, DDIMScheduler
from training.denoiser import TextToLatents

SCHEDULER = DDIMConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=True,
)


def export(
    vae: AutoencoderKL, model: TextToLatents, tokenizer: CLIPTokenizer, scaling_factor: float, folder: Path
) -> None:
    """Write `folder` as `StableDiffusionPipeline.from_pretrained` reads it."""
    config: Config = AutoencoderKLConfig.from_dict({**vae.config.to_dict(), "scaling_factor": scaling_factor})
    finished = AutoencoderKL.from_config(config)
    finished.load_state_dict(vae.state_dict())
    pipe = StableDiffusionPipeline(
        vae=finished,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(SCHEDULER),
    )
    pipe.to("cpu", torch.float16).save_pretrained(folder)
    print(f"wrote {folder}", flush=True)
