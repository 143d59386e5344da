"""Checks of the configurations of models, since files may hold anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowtide.configs import Config

LARGEST = 2**20
"""The largest whole number that a configuration may hold."""


def check_types(config: Config, kind: str) -> None:
    """Raise `ValueError`, naming the entry, unless every field holds its type; whole numbers must be at least 1."""
    hints = get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config) if field.name != "unused"):
        value = getattr(config, name)
        if not _fits(value, hints[name]):
            raise ValueError(
                f"{kind} config: {name}={value!r:.80} is not possible; it must be {_type_in_words(hints[name])}."
            )


def check_supported(config: Config, kind: str) -> None:
    """Raise `ValueError` for an entry without a field whose value is not among the supported ones."""
    for key, possible in config.SUPPORTED.items():
        if key in config.unused and config.unused[key] not in possible:
            raise ValueError(f"{kind} config: {key}={config.unused[key]!r} is not supported; possible: {possible}.")


def check_blocks(widths: tuple[int, ...], kind: str, blocks: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `ValueError` unless each list in `blocks` has an entry for every width, each entry being the list's key."""
    for possible, kinds in blocks.items():
        if len(kinds) != len(widths):
            raise ValueError(f"{kind} config: {len(kinds)} blocks for {len(widths)} channel widths.")
        for other in set(kinds) - {possible}:
            raise ValueError(f"{kind} config: block type {other!r} is not supported; possible: {possible!r}.")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is int:
        return type(value) is int and 1 <= value <= LARGEST
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, hint)


def _type_in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_in_words(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_type_in_words(get_args(hint)[0])}"
    names = {int: f"a whole number from 1 to {LARGEST}", float: "a number", str: "text", bool: "true or false"}
    return "null" if hint is NoneType else names[hint]
