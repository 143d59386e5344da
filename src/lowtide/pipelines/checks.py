"""Checks of a call's arguments, before any work is done; those of plain numbers are in `number_checks`."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from lowtide.pipelines.number_checks import check_count
from lowtide.pipelines.pipeline_outputs import OUTPUT_TYPES
from lowtide.planning.run_size import RunSize
from lowtide.schedulers import Generators
from lowtide.whole_numbers import whole


def check_size(height: Any, width: Any, multiple: int) -> tuple[int, int]:
    """Height and width; raises `ValueError` unless both are positive multiples of `multiple` pixels."""
    return _check_side("height", height, multiple), _check_side("width", width, multiple)


def _check_side(name: str, side: Any, multiple: int) -> int:
    number = whole(side)
    if number is None or number < multiple or number % multiple:
        is_number = isinstance(side, numbers.Real) and math.isfinite(side)
        near = max(round(float(side) / multiple), 1) * multiple if is_number else multiple
        raise ValueError(f"{name}={side!r:.80} is not possible: it must be a multiple of {multiple}; try {near}.")
    return number


LARGEST_SIDE = 32768
"""Pixels; plans are made for sides up to this length."""


CALL_NAMES = {
    "num_inference_steps": "steps",
    "num_frames": "frames",
    "num_images_per_prompt": "pictures",
    "num_videos_per_prompt": "pictures",
    "output_type": "output",
}
"""Arguments of a pipeline's call, and what they are called in a run's size."""


def size_of_call(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A run's size by the names of `RunSize`, where it is asked for by the arguments of a call.

    `guidance_scale` says whether the run is guided; a list as `prompt`, how many prompts there are. Raises `ValueError`
    for what is asked for under both names.
    """
    size: dict[str, Any] = {}
    for name, value in asked.items():
        own = CALL_NAMES.get(name, name)
        if own in size or (own != name and own in asked):
            raise ValueError(f"{name} and {own} are both given, and mean the same: give one of them.")
        size[own] = value
    if "guidance_scale" in size:
        size.setdefault("guided", size.pop("guidance_scale") > 1)
    prompt = size.pop("prompt", None)
    if isinstance(prompt, list | tuple):
        size.setdefault("prompts", len(prompt))
        size["pictures"] = len(prompt) * (size.get("pictures") or 1)
    return size


def run_size(height: int, width: int, **asked: Any) -> RunSize:
    """The size of a run; raises `ValueError` for names that `RunSize` does not have, and for impossible values."""
    asked = size_of_call(asked)
    possible = [field.name for field in fields(RunSize)]
    unknown = sorted(set(asked) - set(possible))
    if unknown:
        raise ValueError(f"A run's size has no {', '.join(unknown)}; it has {', '.join(possible)}.")
    given = {name: value for name, value in asked.items() if value is not None}
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(f"{width}x{height} is not possible: a side is at most {LARGEST_SIDE} pixels.")
    if given.get("output", "pil") not in OUTPUT_TYPES:
        raise ValueError(f"output={given['output']!r} is not possible; choose one of {', '.join(OUTPUT_TYPES)}.")
    if not isinstance(given.get("guided", True), bool):
        raise ValueError(f"guided={given['guided']!r} is not possible: it is True or False.")
    for name in ("pictures", "prompts", "steps", "frames"):
        if name in given:
            given[name] = check_count(name, given[name])
    if given.get("prompts", 1) > given.get("pictures", 1):
        raise ValueError("A run makes at least one picture of each prompt: prompts is at most pictures.")
    return RunSize(height, width, **given)


def check_output_type(output_type: str, output_path: object = None, possible: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raise `ValueError` for an unknown output type, or a path for one that makes no file."""
    if output_path is not None and output_type != "file":
        raise ValueError(f"output_path is for output_type='file', and it is {output_type!r}.")
    if output_type not in possible:
        raise ValueError(f"output_type={output_type!r} is not possible; choose one of {', '.join(possible)}.")


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
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(text, str) for text in prompt)
    if prompt is not None and not isinstance(prompt, str) and not listed:
        raise ValueError(f"{text} must be a text or a list of texts (at least one), not {prompt!s:.200}.")
    if prompt_embeds is not None and (not isinstance(prompt_embeds, torch.Tensor) or prompt_embeds.ndim != 3):
        raise ValueError(f"{embeds} must be a tensor [batch, tokens, channels].")
    if prompt_embeds is not None and 0 in prompt_embeds.shape:
        raise ValueError(f"{embeds} {list(prompt_embeds.shape)} hold nothing: there must be at least one row.")


def count_prompts(prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    """How many prompts there are; one of the two is given."""
    if isinstance(prompt, str):
        return 1
    given = prompt_embeds if prompt is None else prompt
    assert given is not None
    return len(given)


def check_width(
    embeds: torch.Tensor | None, name: str, width: int, *, reader: str = "the U-Net", tokens: int | None = None
) -> None:
    """Raise `ValueError` for embeddings that the denoiser cannot read; `tokens` None: any number of them."""
    if embeds is not None and (embeds.shape[2] != width or tokens not in (None, embeds.shape[1])):
        shape = f"[batch, {tokens or 'tokens'}, {width}]"
        raise ValueError(f"{name} {list(embeds.shape)} do not fit: {reader} reads {shape}.")


def check_text_length(length: int, tokens: int | None) -> None:
    """Raise `ValueError` for texts of another length than the denoiser has positions for; None: any length."""
    if tokens not in (None, length):
        raise ValueError(f"max_sequence_length={length} is not possible: this model reads {tokens} tokens.")


def check_text_parts(text_encoder: object, tokenizer: object, instead: str) -> None:
    """Raise `ValueError` where text would have to be read and a part for it is missing."""
    if text_encoder is None or tokenizer is None:
        name = "text_encoder" if text_encoder is None else "tokenizer"
        raise ValueError(f"This pipeline has no {name} to read text with: give {instead}.")


def check_negatives(prompts: Sequence[int], negatives: Sequence[int]) -> None:
    """Raise `ValueError` unless negative prompts fit the prompts; each as (how many, of how many tokens)."""
    if negatives[0] not in (1, prompts[0]):
        raise ValueError(
            f"{negatives[0]} negative prompts for {prompts[0]} prompts; give one for all, or one for each."
        )
    if negatives[1] != prompts[1]:
        raise ValueError(
            f"Negative prompts of {negatives[1]} tokens do not fit prompts of {prompts[1]}: give embeddings of one "
            "length, or of the length that text is padded to."
        )


def check_generator(generator: Generators) -> None:
    """Raise `ValueError` unless it is None, a generator, or a list of them."""
    listed = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(item, torch.Generator) for item in listed):
        raise ValueError(f"generator must be a torch.Generator or a list of them, not {generator!r:.80}.")


def check_noise(shape: tuple[int, ...], latents: torch.Tensor | None, generator: Generators) -> None:
    """Raise `ValueError` for latents of another shape, and unless a list has one generator for each item."""
    if isinstance(latents, torch.Tensor) and tuple(latents.shape) != shape:
        raise ValueError(f"latents {list(latents.shape)} do not fit: these clips need {list(shape)}.")
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents must be a tensor {list(shape)}, not {type(latents).__name__}.")
    if isinstance(generator, Sequence) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators were given for a batch of {shape[0]}: give one for each item.")


def check_timesteps(scheduler: Any, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None = None) -> None:
    """Raise `ValueError` for timesteps or sigmas that a scheduler does not take, and for both."""
    possible = inspect.signature(scheduler.set_timesteps).parameters
    for name, told in (("timesteps", timesteps), ("sigmas", sigmas)):
        if told is not None and name not in possible:
            raise ValueError(
                f"{name} is not possible: a {type(scheduler).__name__} lays out its own timesteps. Give "
                "num_inference_steps, or build the scheduler with another timestep_spacing."
            )
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas are both given; give one of them.")


def count_steps(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None = None,
) -> int:
    """The number of steps: of timesteps or sigmas that are told, as many as a copy of the scheduler lays out.

    Raises `ValueError` if the scheduler refuses them.
    """
    told = {name: list(values) for name, values in (("timesteps", timesteps), ("sigmas", sigmas)) if values is not None}
    if not told:
        return num_inference_steps
    trial = copy.copy(scheduler)
    trial.set_timesteps(**told)
    return len(trial.timesteps)


def check_attention_kwargs(attention_kwargs: Mapping[str, Any] | None, name: str = "attention_kwargs") -> None:
    """Raise `ValueError` if there are any: they would go to adapters."""
    if attention_kwargs:
        raise ValueError(
            f"{name}={dict(attention_kwargs)!r:.80} is not possible: they are for adapters, which "
            "Lowtide does not have. Leave it out; how attention is computed is chosen with set_attention_backend."
        )


def warn_of_other_frames(asked: int, decoded: int) -> None:
    """Warn where a clip has another number of frames than was asked for."""
    if asked != decoded:
        warnings.warn(
            f"num_frames={asked} is not possible: the frames are decoded in groups, and there will be {decoded}.",
            stacklevel=4,
        )


def warn_of_long_prompts(tokenizer: Any, texts: Sequence[str], length: int, *, own_tokens: int) -> None:
    """Warn of texts that are cut to `length` tokens, `own_tokens` of which the tokenizer adds itself."""
    for text in texts:
        excess = tokenizer(text, verbose=False).input_ids[length - 1 : -1]
        if excess:
            warnings.warn(
                f"The model reads {length - own_tokens} tokens; of this prompt it ignores "
                f"{tokenizer.decode(excess)!r}.",
                stacklevel=6,
            )


def check_callback_inputs(names: Sequence[str], possible: Sequence[str]) -> None:
    """Raise `ValueError` for tensors that a step callback cannot have."""
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={unknown} is not possible; choose from {', '.join(possible)}."
        )


def check_returned(returned: Any, possible: Sequence[str]) -> dict[str, Any]:
    """The tensors that a step callback changed; raises `TypeError` for anything but a dict or None.

    Raises `ValueError` for names that it cannot change.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"callback_on_step_end returned a {type(returned).__name__}; it must be None, or a dict of changed tensors "
            f"by name: {', '.join(possible)}."
        )
    unknown = [name for name in returned if name not in possible]
    if unknown:
        raise ValueError(f"callback_on_step_end returned {unknown!r:.200}; it may change {', '.join(possible)}.")
    return dict(returned)
