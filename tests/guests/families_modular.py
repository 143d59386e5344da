"""Guests put together from blocks of the peer's modular pipelines, with components that are given to them."""

from __future__ import annotations

from typing import Any

from tests.guests.families_two_streams import BOTH_STREAMS, flux_parts
from tests.guests.families_unets import BLOCKS, large_parts
from tests.guests.family import PROMPT, Family, family, stacked

CALL = {"prompt": PROMPT, "num_inference_steps": 2, "height": 64, "width": 48, "output_type": "pt", "output": "images"}
"""`output` names what the call returns of all that the blocks have computed."""


def modular_flux() -> Family:
    """Flux as blocks."""
    from diffusers.modular_pipelines.flux import FluxAutoBlocks

    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**flux_parts())
    return family(pipe, {**CALL, "max_sequence_length": 24}, *BOTH_STREAMS, result=stacked)


def modular_sdxl() -> Family:
    """SDXL as blocks, where a component of its own guides."""
    from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

    pipe: Any = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**large_parts())
    return family(pipe, {**CALL, "negative_prompt": "stars"}, *BLOCKS, result=stacked)


MODULAR = {"modular Flux": modular_flux, "modular SDXL": modular_sdxl}
