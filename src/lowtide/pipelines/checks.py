"""Checks of what a caller asks for, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowtide.pipelines.outputs import OUTPUT_TYPES


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise `ValueError` unless both are positive multiples of `multiple` pixels."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < multiple or value % multiple:
            near = max(round(value / multiple), 1) * multiple if isinstance(value, (int, float)) else multiple
            raise ValueError(f"{name}={value!r} is not possible: it must be a multiple of {multiple}; try {near}.")


def check_counts(num_inference_steps: int, num_images_per_prompt: int) -> None:
    """Raise `ValueError` unless both are whole and at least 1."""
    for name, value in (("num_inference_steps", num_inference_steps), ("num_images_per_prompt", num_images_per_prompt)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not possible: it must be a whole number, at least 1.")


def check_output_type(output_type: str) -> None:
    """Raise `ValueError` for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not possible; choose one of {', '.join(OUTPUT_TYPES)}.")


def check_prompt(
    prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    names: tuple[str, str],
    *,
    needed: bool = True,
) -> None:
    """Raise `ValueError` unless text or embeddings are given, and not both; `names` are what the caller calls them."""
    text, embeds = names
    if prompt is not None and prompt_embeds is not None:
        raise ValueError(f"{text} and {embeds} are both given; give one of them.")
    if needed and prompt is None and prompt_embeds is None:
        raise ValueError(f"Neither {text} nor {embeds} is given; give one of them.")
    if prompt is not None and not isinstance(prompt, str):
        if not isinstance(prompt, (list, tuple)) or not prompt or not all(isinstance(one, str) for one in prompt):
            raise ValueError(f"{text} must be a text or a list of texts (at least one), not {prompt!r:.200}.")
    if prompt_embeds is not None and (not isinstance(prompt_embeds, torch.Tensor) or prompt_embeds.ndim != 3):
        raise ValueError(f"{embeds} must be a tensor [batch, tokens, channels].")


def check_same_batch(negative: int, batch: int) -> None:
    """Raise `ValueError` unless there is one negative prompt for all, or one for each."""
    if negative not in (1, batch):
        raise ValueError(f"{negative} negative prompts for {batch} prompts; give one for all, or one for each.")


def check_callback_inputs(names: Sequence[str], possible: Sequence[str]) -> None:
    """Raise `ValueError` for tensors that a step callback cannot have."""
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={unknown} is not possible; choose from {', '.join(possible)}."
        )
