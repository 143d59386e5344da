"""Checks of what a caller asks for, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowtide.pipelines.outputs import OUTPUT_TYPES
from lowtide.schedulers import Generators


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


def check_output_type(output_type: str, output_path: object = None) -> None:
    """Raise `ValueError` for an unknown output type, or a path for one that makes no file."""
    if output_path is not None and output_type != "file":
        raise ValueError(f"output_path is for output_type='file', and it is {output_type!r}.")
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
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(one, str) for one in prompt)
    if prompt is not None and not isinstance(prompt, str) and not listed:
        raise ValueError(f"{text} must be a text or a list of texts (at least one), not {prompt!s:.200}.")
    if prompt_embeds is not None and (not isinstance(prompt_embeds, torch.Tensor) or prompt_embeds.ndim != 3):
        raise ValueError(f"{embeds} must be a tensor [batch, tokens, channels].")


def count_prompts(prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    """How many prompts there are; one of the two is given."""
    if isinstance(prompt, str):
        return 1
    given = prompt_embeds if prompt is None else prompt
    assert given is not None
    return len(given)


def check_width(embeds: torch.Tensor | None, name: str, width: int) -> None:
    """Raise `ValueError` for embeddings that the U-Net cannot read."""
    if embeds is not None and embeds.shape[2] != width:
        raise ValueError(f"{name} {list(embeds.shape)} do not fit: the U-Net reads [batch, tokens, {width}].")


def check_pair(negative: torch.Tensor, positive: torch.Tensor) -> None:
    """Raise `ValueError` unless there is one negative prompt for all, or one for each, of as many tokens."""
    if len(negative) not in (1, len(positive)):
        raise ValueError(
            f"{len(negative)} negative prompts for {len(positive)} prompts; give one for all, or one for each."
        )
    if negative.shape[1:] != positive.shape[1:]:
        raise ValueError(
            f"Negative embeddings {list(negative.shape)} do not fit embeddings {list(positive.shape)}: tokens and "
            "channels must be as many. Give both prompt_embeds and negative_prompt_embeds, of one length."
        )


def check_generator(generator: Generators) -> None:
    """Raise `ValueError` unless it is None, a generator, or a list of them."""
    listed = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in listed):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r:.80}.")


def check_callback_inputs(names: Sequence[str], possible: Sequence[str]) -> None:
    """Raise `ValueError` for tensors that a step callback cannot have."""
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={unknown} is not possible; choose from {', '.join(possible)}."
        )
