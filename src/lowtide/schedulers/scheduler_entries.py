"""Checks of single entries of a scheduler's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from lowtide.config_checks import LARGE, SMALLEST, Range
from lowtide.configs import Config

MOST_TIMESTEPS = 100_000
RANGES: Mapping[str, Range] = {
    "num_train_timesteps": (1, MOST_TIMESTEPS),
    "steps_offset": (0, MOST_TIMESTEPS),
    "lambda_min_clipped": (-math.inf, LARGE),
    "clip_sample_range": (SMALLEST, LARGE),
    "sigma_min": (SMALLEST, LARGE),
    "sigma_max": (SMALLEST, LARGE),
    "dynamic_thresholding_ratio": (0, 1),
    "sample_max_value": (SMALLEST, LARGE),
    "flow_shift": (1e-3, 1e3),
    "shift_terminal": (1e-6, 1 - 1e-6),
}


def are_all(values: Any, *kinds: type) -> bool:
    """Whether this is a list or a tuple, all of whose items are of one of the `kinds`; derived classes do not count."""
    return isinstance(values, (list, tuple)) and all(type(item) in kinds for item in cast("list[Any]", values))


def are_betas(betas: Any, count: int) -> bool:
    """Whether these are `count` numbers between 0 and 1."""
    return are_all(betas, int, float) and len(betas) == count and all(0 < beta < 1 for beta in betas)


def check_number(config: Config, key: str, kind: type | tuple[type, ...], low: float, high: float) -> None:
    """Raise `ValueError` unless the entry `key` is a number of a `kind`, from `low` to `high`."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        raise unsupported(config, key, f"{noun} from {low:g} to {high:g}")


def unsupported(config: Config, key: str, possible: str) -> ValueError:
    """The error for the value of the entry `key`, saying what is `possible`."""
    return ValueError(f"{_name(config)}: {key}={config.get(key)!r:.80} is not supported; it must be {possible}.")


def check_apart(config: Config, *keys: str) -> None:
    """Raise `ValueError` where more than one of the entries `keys` is on."""
    on = [key for key in keys if getattr(config, key)]
    if len(on) > 1:
        raise ValueError(f"{_name(config)}: {' and '.join(on)} are not possible together; leave out all but one.")


def check_needs(config: Config, key: str, needed: str) -> None:
    """Raise `ValueError` where the entry `key` is on and the one that it has its effect through is off."""
    if getattr(config, key) and not getattr(config, needed):
        value = getattr(config, key)
        raise ValueError(f"{_name(config)}: {key}={value!r} is possible only with {needed}=True; leave it out.")


def _name(config: Config) -> str:
    return type(config).__name__.removesuffix("Config")
