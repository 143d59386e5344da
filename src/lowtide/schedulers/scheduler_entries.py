"""Checks of single entries of a scheduler's configuration."""

from __future__ import annotations

from typing import Any, cast

from lowtide.configs import Config


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
    name = type(config).__name__.removesuffix("Config")
    return ValueError(f"{name}: {key}={config.get(key)!r:.80} is not supported; it must be {possible}.")
