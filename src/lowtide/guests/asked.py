"""What people ask for in options of ours, as arguments of a foreign pipeline's own call: one table of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from inspect import Parameter, Signature
from typing import Any

PROMPT = "PROMPT"
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    PROMPT: (("prompt",),),
    "--negative": (("negative_prompt",),),
    "--size": (("width", "height"),),
    "--frames": (("num_frames",), ("video_length",)),
    "--steps": (("num_inference_steps",), ("steps",)),
    "--guidance": (("guidance_scale",), ("true_cfg_scale",)),
    "--count": (("num_images_per_prompt",), ("num_videos_per_prompt",), ("num_waveforms_per_prompt",)),
    "--batch": (("num_images_per_prompt",), ("num_videos_per_prompt",), ("num_waveforms_per_prompt",)),
    "--seed": (("generator",),),
    "--image": (("image",),),
}
"""For each option, the arguments that it becomes.

Of several possibilities that a call takes, the first one counts that has a value by default: calls of Flux guide by
`guidance_scale` and those of Qwen-Image, which take both, by `true_cfg_scale`.
"""
OF_CLIPS = ("num_frames", "video_length", "num_videos_per_prompt")
"""Arguments that calls have which make clips."""
OF_SOUND = ("audio_length_in_s", "audio_end_in_s", "audio_duration", "audio_duration_s", "num_waveforms_per_prompt")
"""Arguments that calls have which make sound alone."""
_RATES = ("frame_rate", "fps")
_NOT_TYPED = re.compile(r"generator|return_dict|.*callback.*|(.*_)?latents|.*_embeds|.*_(attention|embeds)_mask")
"""Arguments that cannot be written in words and numbers."""


def call_arguments(
    pipeline: str,
    call: Signature,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    lacking: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments of a call with this signature for what was asked.

    `options` are values by option of `NAMES`, `settings` values by the call's own names; the command has no options
    that are `lacking`. Raises `ValueError` for what the call has no name for, in one line with what it takes, and for
    what is asked twice.
    """
    arguments: dict[str, Any] = {}
    for option, value in options.items():
        names = own_names(option, call)
        if not names:
            raise ValueError(_refusal(option, pipeline, call, {PROMPT, *lacking}))
        arguments |= dict(zip(names, value if len(names) > 1 else (value,), strict=True))
    possible = _settable(call)
    for name, value in settings.items():
        if name in arguments:
            option = next(option for option in options if name in own_names(option, call))
            raise ValueError(f"{name} is given by {option} and by its own name: leave one of them out.")
        if name not in possible:
            raise ValueError(f"{name}: a call of {pipeline} takes no such argument. It takes {', '.join(possible)}.")
        arguments[name] = value
    return arguments


def own_names(option: str, call: Signature) -> tuple[str, ...]:
    """The arguments that an option becomes; none where the call has no name for it."""
    possible = [names for names in NAMES[option] if set(names) <= set(call.parameters)]
    usual = (names for names in possible if all(value_of(call, name) is not None for name in names))
    return next(usual, possible[0] if possible else ())


def hint_for(call: Signature, arguments: Mapping[str, Any]) -> str:
    """What may be missing where a call does not go: a picture that was not given."""
    names = own_names("--image", call)
    return "It takes --image, which was not given." if names and arguments.get(names[0]) is None else ""


def makes_clips(call: Signature) -> bool:
    """Whether a call makes clips, not pictures, as far as its arguments tell."""
    return not set(OF_CLIPS).isdisjoint(call.parameters)


def makes_sound(call: Signature) -> bool:
    """Whether a call makes sound without pictures, as far as its arguments tell."""
    return not makes_clips(call) and not set(OF_SOUND).isdisjoint(call.parameters)


def frame_rate(call: Signature, arguments: Mapping[str, Any]) -> float | None:
    """The frames a second that a call makes clips for, as given or by default; None where it does not say."""
    values = (arguments.get(name, value_of(call, name)) for name in _RATES)
    return next((float(value) for value in values if type(value) in (int, float) and value > 0), None)


def value_of(call: Signature, name: str) -> Any:
    """What an argument is by default; None where there is none."""
    parameter = call.parameters.get(name)
    return None if parameter is None or parameter.default is Parameter.empty else parameter.default


def _settable(call: Signature) -> list[str]:
    plain = (name for name, parameter in call.parameters.items() if parameter.kind is not Parameter.VAR_KEYWORD)
    return [name for name in plain if not _NOT_TYPED.fullmatch(name)]


def _refusal(option: str, pipeline: str, call: Signature, lacking: Collection[str]) -> str:
    taken = [name for name in NAMES if name not in lacking and own_names(name, call)]
    by_option = {name for other in NAMES for name in own_names(other, call)}
    others = [name for name in _settable(call) if name not in by_option]
    what = 'prompt (give an empty one: "")' if option == PROMPT else option
    return (
        f"{pipeline} takes no {what}. It takes {', '.join(taken) or 'no options'}, and with --set NAME=VALUE "
        f"{', '.join(others) or 'nothing'}."
    )
