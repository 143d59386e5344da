"""Sound that came out of a foreign pipeline's call, and how many samples of it are a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

SOUNDS = ("audio", "audios")
"""What results call sound."""
_OF_PIPELINES = ("audio_sample_rate", "sample_rate")
_OF_NETWORKS = ("output_sampling_rate", "sampling_rate", "sample_rate")
_LAST = ("vocoder", "audio_vae", "vae", "unet")
"""The networks that sound may come out of: a vocoder, where there is one, gives other rates than what is before it."""


def sounds_in(value: Any) -> tuple[np.ndarray, ...] | None:
    """The sounds in a result, each float32 `[channels, time]`; None for what is no sound.

    A result is an array or a tensor `[sounds, time]` or `[sounds, channels, time]`, or a list of those of one sound.
    """
    try:
        sounds = tuple(_each(value))
    except ValueError:
        return None
    return sounds or None


def sampling_rate(pipe: Any) -> int | None:
    """The samples a second of the sound that a pipeline makes; None where it does not say."""
    configs = [getattr(getattr(pipe, name, None), "config", None) for name in _LAST]
    vocoded, *others = (_rate(config, _OF_NETWORKS) for config in configs)
    return vocoded or _rate(pipe, _OF_PIPELINES) or next(filter(None, others), None)


def _rate(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value: Any = getattr(owner, name, None)
        if type(value) in (int, float) and value > 0:
            return int(value)
    return None


def _each(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, (list, tuple)):
        for sound in value:
            yield _channels_first(_array(sound))
        return
    samples = _array(value)
    if samples.ndim not in (2, 3):
        raise ValueError(f"the shape {list(samples.shape)} is no sound")
    yield from map(_channels_first, samples)


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"a {type(value).__name__} is no sound")
    return value.astype(np.float32, copy=False)


def _channels_first(samples: np.ndarray) -> np.ndarray:
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise ValueError(f"the shape {list(samples.shape)} is no sound")
    return samples[None] if samples.ndim == 1 else samples
