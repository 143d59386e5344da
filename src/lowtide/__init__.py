"""Lowtide: diffusion models in the memory you have.

The public names are imported on first use, so that `import lowtide` brings in neither torch nor transformers.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.activations.row_streaming import apply_row_streaming, remove_row_streaming
    from lowtide.casting.casting import Casting
    from lowtide.guests.doors import apply_plan, fit, plan_of, report, unfit
    from lowtide.guests.library import NoGuestsError
    from lowtide.guests.load_any import load
    from lowtide.machine.memory_errors import OutOfMemoryError
    from lowtide.memory.presets import apply_residency
    from lowtide.models.clip_text import CLIPTextModel
    from lowtide.models.image_processor import CLIPImageProcessor
    from lowtide.models.safety_checker import StableDiffusionSafetyChecker
    from lowtide.models.t5 import T5EncoderModel
    from lowtide.models.tokenizers import CLIPTokenizer, T5Tokenizer
    from lowtide.models.unet import UNet2DConditionModel
    from lowtide.models.vae import AutoencoderKL
    from lowtide.models.video_transformer import CogVideoXTransformer3DModel
    from lowtide.models.video_vae import AutoencoderKLCogVideoX
    from lowtide.pipelines.base import DiffusionPipeline
    from lowtide.pipelines.cogvideox import CogVideoXPipeline
    from lowtide.pipelines.not_finite import NotFiniteWarning
    from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
    from lowtide.planning.plan import BudgetError, Plan
    from lowtide.schedulers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )

__version__ = "0.1.0"

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""PyTorch has Linux make its tensors of 2 MiB and more of large pages. It reads this when it makes the first."""

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "BudgetError",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTokenizer",
    "Casting",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXPipeline",
    "CogVideoXTransformer3DModel",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "EulerDiscreteScheduler",
    "NoGuestsError",
    "NotFiniteWarning",
    "OutOfMemoryError",
    "PNDMScheduler",
    "Plan",
    "StableDiffusionPipeline",
    "StableDiffusionSafetyChecker",
    "T5EncoderModel",
    "T5Tokenizer",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
    "__version__",
    "apply_plan",
    "apply_residency",
    "apply_row_streaming",
    "fit",
    "load",
    "plan_of",
    "remove_row_streaming",
    "report",
    "unfit",
]

_HOME = {
    "AutoencoderKL": "lowtide.models.vae",
    "AutoencoderKLCogVideoX": "lowtide.models.video_vae",
    "BudgetError": "lowtide.planning.plan",
    "CLIPImageProcessor": "lowtide.models.image_processor",
    "CLIPTextModel": "lowtide.models.clip_text",
    "CLIPTokenizer": "lowtide.models.tokenizers",
    "Casting": "lowtide.casting.casting",
    "NotFiniteWarning": "lowtide.pipelines.not_finite",
    "OutOfMemoryError": "lowtide.machine.memory_errors",
    "Plan": "lowtide.planning.plan",
    "NoGuestsError": "lowtide.guests.library",
    "apply_plan": "lowtide.guests.doors",
    "fit": "lowtide.guests.doors",
    "load": "lowtide.guests.load_any",
    "plan_of": "lowtide.guests.doors",
    "report": "lowtide.guests.doors",
    "unfit": "lowtide.guests.doors",
    "CogVideoXDDIMScheduler": "lowtide.schedulers",
    "CogVideoXDPMScheduler": "lowtide.schedulers",
    "CogVideoXPipeline": "lowtide.pipelines.cogvideox",
    "CogVideoXTransformer3DModel": "lowtide.models.video_transformer",
    "DDIMScheduler": "lowtide.schedulers",
    "DPMSolverMultistepScheduler": "lowtide.schedulers",
    "DiffusionPipeline": "lowtide.pipelines.base",
    "EulerDiscreteScheduler": "lowtide.schedulers",
    "PNDMScheduler": "lowtide.schedulers",
    "StableDiffusionPipeline": "lowtide.pipelines.stable_diffusion",
    "StableDiffusionSafetyChecker": "lowtide.models.safety_checker",
    "T5EncoderModel": "lowtide.models.t5",
    "T5Tokenizer": "lowtide.models.tokenizers",
    "UNet2DConditionModel": "lowtide.models.unet",
    "UniPCMultistepScheduler": "lowtide.schedulers",
    "apply_residency": "lowtide.memory",
    "apply_row_streaming": "lowtide.activations.row_streaming",
    "remove_row_streaming": "lowtide.activations.row_streaming",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
