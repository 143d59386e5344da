"""The check of finished pictures: by the published checker, or by any function of a script's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.pipelines.pipeline_outputs import to_pil, to_unit_range


def checked(pipe: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
    """Pictures `[B, 3, H, W]` in [0, 1] after the check, and which were unsafe; None where nothing checks.

    The published checker's are blackened. Any other callable is given `images` in [-1, 1] and `clip_input`, and returns
    images and a flag for each, as in the peer: an image that it flags is taken as it returns it.
    """
    checker = pipe.safety_checker
    if checker is None:
        return pixels, None
    if isinstance(checker, StableDiffusionSafetyChecker):
        with pipe.stages.stage("safety check"):
            unsafe = checker(_clip_input(pipe, pixels))
        pixels = pixels * _column([not flagged for flagged in unsafe], pixels)
    else:
        answer = checker(images=2 * pixels - 1, clip_input=_clip_input(pipe, pixels))
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise TypeError("safety_checker must return the images and a list with True for each that is unsafe.")
        images, flags = answer[0], answer[1]
        unsafe = [bool(flag) for flag in flags]
        pixels = torch.where(_column(unsafe, pixels), images, to_unit_range(images))
    if any(unsafe):
        warnings.warn("The safety checker blackened a picture; try another prompt or seed.", stacklevel=6)
    return pixels, unsafe


def _clip_input(pipe: Any, pixels: torch.Tensor) -> torch.Tensor | None:
    if pipe.feature_extractor is None:
        return None
    pictures = to_pil(pixels.cpu().permute(0, 2, 3, 1).float().numpy())
    values = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
    return values.to(pipe.device, pipe.dtype)


def _column(flags: list[bool], pixels: torch.Tensor) -> torch.Tensor:
    return torch.tensor(flags, device=pixels.device)[:, None, None, None]
