"""Guidance away from negative prompts: of one step, from step to step, and after a callback has changed its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def dynamic_guidance(guidance_scale: float, timestep: float, num_steps: int) -> float:
    """The guidance of one step: 1 + scale · (1 - cos(π · x⁵)) / 2 with x = (steps - timestep) / steps.

    The timestep is that of the training schedule, as in other libraries: x runs from far below 0 to nearly 1.
    """
    x = (num_steps - timestep) / num_steps
    return 1 + guidance_scale * ((1 - math.cos(math.pi * x**5.0)) / 2)


def embeds_for(embeds: torch.Tensor, latents: torch.Tensor, guided: bool) -> torch.Tensor:
    """The embeddings that a step reads: all of them, or without guidance the last of them, those of the prompts.

    Raises `ValueError` where the step is guided and there are none of negative prompts.
    """
    if not guided:
        return embeds if len(embeds) == len(latents) else embeds[-len(latents) :]
    if len(embeds) == len(latents):
        raise ValueError(
            "guidance_scale is above 1, and there are no embeddings of negative prompts: begin the call with guidance, "
            "and let a callback that cuts prompt_embeds assign pipe._guidance_scale = 1.0, too."
        )
    return embeds


def guided_noise(
    negative: torch.Tensor, positive: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """The prediction away from the negative prompt (arXiv 2207.12598): n + scale · (p - n).

    A share `guidance_rescale` of it is given the standard deviation of `positive` back (arXiv 2305.08891, Eq. 15, 16).
    """
    guided = negative + guidance_scale * (positive - negative)
    if guidance_rescale <= 0:
        return guided
    axes = list(range(1, guided.ndim))
    ratio = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guidance_rescale * (guided * ratio) + (1 - guidance_rescale) * guided


def changed_by_callback(
    x: torch.Tensor,
    embeds: torch.Tensor,
    negative: torch.Tensor | None,
    returned: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Latents, all embeddings and negative embeddings after a callback; changed negative ones replace the old ones.

    Embeddings of the prompts alone end the guidance: from then on there are no negative ones, whatever the callback
    returned. Raises `ValueError` for any other number of embeddings.
    """
    x, embeds = returned.get("latents", x), returned.get("prompt_embeds", embeds)
    if len(embeds) not in (len(x), 2 * len(x)):
        raise ValueError(
            f"callback_on_step_end left {len(embeds)} prompt_embeds for {len(x)} latents; it must be {2 * len(x)}, or "
            f"{len(x)} to end the guidance."
        )
    if negative is None or len(embeds) == len(x):
        return x, embeds, None
    changed = returned.get("negative_prompt_embeds", negative)
    if changed is not None and changed is not negative:
        embeds = torch.cat([changed.to(embeds), embeds[len(x) :]])
    return x, embeds, changed
