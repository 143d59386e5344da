"""Schedulers: which noise levels to visit, and how to step from one to the next."""

from lowtide.schedulers.cogvideox_ddim import CogVideoXDDIMConfig, CogVideoXDDIMScheduler
from lowtide.schedulers.cogvideox_dpm import CogVideoXDPMConfig, CogVideoXDPMScheduler
from lowtide.schedulers.common import (
    CONFIG_NAME,
    Scheduler,
    SchedulerConfig,
    StepOutput,
)
from lowtide.schedulers.ddim import DDIMConfig, DDIMScheduler
from lowtide.schedulers.dpmsolver import DPMSolverMultistepConfig, DPMSolverMultistepScheduler
from lowtide.schedulers.euler import EulerDiscreteConfig, EulerDiscreteScheduler
from lowtide.schedulers.fresh_noise import Generators, draw_noise
from lowtide.schedulers.pndm import PNDMConfig, PNDMScheduler
from lowtide.schedulers.unipc import UniPCMultistepConfig, UniPCMultistepScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    "DDIMScheduler": DDIMScheduler,
    "PNDMScheduler": PNDMScheduler,
    "UniPCMultistepScheduler": UniPCMultistepScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "CogVideoXDDIMScheduler": CogVideoXDDIMScheduler,
    "CogVideoXDPMScheduler": CogVideoXDPMScheduler,
}

SHORT_NAMES: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "cogvideox-ddim": "CogVideoXDDIMScheduler",
    "cogvideox-dpm": "CogVideoXDPMScheduler",
}

__all__ = [
    "CONFIG_NAME",
    "SCHEDULERS",
    "SHORT_NAMES",
    "CogVideoXDDIMConfig",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMConfig",
    "CogVideoXDPMScheduler",
    "DDIMConfig",
    "DDIMScheduler",
    "DPMSolverMultistepConfig",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteConfig",
    "EulerDiscreteScheduler",
    "Generators",
    "PNDMConfig",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerConfig",
    "StepOutput",
    "UniPCMultistepConfig",
    "UniPCMultistepScheduler",
    "draw_noise",
]
