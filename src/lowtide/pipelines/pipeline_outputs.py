"""What pipelines return, and how decoded tensors become pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "file")
VIDEO_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class StableDiffusionPipelineOutput:
    """Pictures, as the `output_type` asked for, and for each whether the safety checker blackened it.

    `images`: a list of PIL images ("pil"), float32 `[B, H, W, 3]` in [0, 1] ("np"), `[B, 3, H, W]` in [0, 1] ("pt"),
    latents `[B, 4, H/8, W/8]` ("latent"), or the paths of PNG files ("file"). `nsfw_content_detected` is None where
    there is no checker.
    """

    images: Any
    nsfw_content_detected: list[bool] | None


@dataclass
class CogVideoXPipelineOutput:
    """Clips, as the `output_type` asked for; `output[0]` is `output.frames`.

    `frames`: a list of PIL images for each clip ("pil"), float32 `[B, F, H, W, 3]` in [0, 1] ("np"), `[B, F, 3, H, W]`
    in [0, 1] ("pt"), or latents `[B, f, C, H/8, W/8]` ("latent"). Latents of version 1.5 begin with
    `pipe.padding(num_frames)` frames of padding, which must be left out before decoding.
    """

    frames: Any

    def __getitem__(self, key: int | str) -> Any:
        """The frames: entry 0, or the entry called "frames"."""
        return vars(self)[key] if isinstance(key, str) else (self.frames,)[key]


def to_unit_range(decoded_BCHW: torch.Tensor) -> torch.Tensor:
    """From the decoder's nominal [-1, 1] to [0, 1], clamped."""
    return (decoded_BCHW / 2 + 0.5).clamp(0, 1)


def to_output(pixels_BCHW: torch.Tensor, output_type: str) -> Any:
    """Pictures in [0, 1] as "pt", "np" or "pil"."""
    if output_type == "pt":
        return pixels_BCHW
    pixels_BHWC: np.ndarray = pixels_BCHW.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    return pixels_BHWC if output_type == "np" else to_pil(pixels_BHWC)


def to_pil(pixels_BHWC: np.ndarray) -> list[Image.Image]:
    """Float pictures `[B, H, W, 3]` in [0, 1] as 8-bit PIL images, each value rounded."""
    return [Image.fromarray(picture) for picture in (pixels_BHWC * 255).round().astype(np.uint8)]
