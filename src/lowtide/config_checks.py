"""Checks of configurations by kind and range, since files may hold anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowtide.configs import Config

LARGEST = 2**20
"""The largest whole number that a configuration may hold."""
MOST_LAYERS = 200
"""The most layers in a row, or in a block, that a configuration may ask for."""
MOST_ITEMS = 32
"""The longest list; published ones have an item for each level of a network."""
MOST_SIDE = 4096
"""The largest side of the latents, or number of frames, that a model may have been trained on."""
SMALLEST, LARGE = 1e-12, 1e6
"""What numbers that must be above 0 lie between."""

UNCHECKED = ("unused", "given", "trained_betas", "disable_corrector")
"""The fields of configurations that are no entries of a file, or lists of any length that their class checks."""
Range = tuple[float, float]


def check_types(config: Config, kind: str, ranges: Mapping[str, Range] | None = None) -> None:
    """Raise `ValueError`, naming the entry, unless every field holds its type, within its range, or its default.

    Whole numbers without a range are from 1 to `LARGEST`, other numbers any finite ones.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, span = getattr(config, field.name), hints[field.name], (ranges or {}).get(field.name)
        if field.name not in UNCHECKED and value is not field.default and not _fits(value, hint, span):
            said = f"{kind} config: {field.name}={value!r:.80} is not possible"
            raise ValueError(f"{said}; it must be {_type_in_words(hint, span)}.")


def check_supported(config: Config, kind: str) -> None:
    """Raise `ValueError` for an entry without a field whose value is not among the supported ones."""
    for key, possible in config.SUPPORTED.items():
        if key in config.unused and config.unused[key] not in possible:
            raise ValueError(f"{kind} config: {key}={config.unused[key]!r:.80} is not supported; possible: {possible}.")


def check_blocks(widths: tuple[int, ...], kind: str, blocks: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `ValueError` unless each list in `blocks` has an entry for every width, each entry being the list's key."""
    for possible, kinds in blocks.items():
        if len(kinds) != len(widths):
            raise ValueError(f"{kind} config: {len(kinds)} blocks for {len(widths)} channel widths.")
        for other in set(kinds) - {possible}:
            raise ValueError(f"{kind} config: block type {other[:80]!r} is not supported; possible: {possible!r}.")


def _fits(value: Any, hint: Any, span: Range | None) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option, span) for option in get_args(hint))
    if get_origin(hint) is tuple:
        several = isinstance(value, tuple) and 0 < len(value) <= MOST_ITEMS
        return several and all(_fits(item, get_args(hint)[0], span) for item in value)
    if hint is int:
        low, high = span or (1, LARGEST)
        return type(value) is int and low <= value <= high
    if hint is Any:
        return True
    if hint is float:
        low, high = span or (-LARGEST, LARGEST)
        return type(value) in (int, float) and not math.isnan(value) and low <= value <= high
    return isinstance(value, hint)


def _type_in_words(hint: Any, span: Range | None) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_in_words(option, span) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of up to {MOST_ITEMS}, each {_type_in_words(get_args(hint)[0], span)}"
    low, high = span or (1, LARGEST)
    within = "" if span is None else f" from {low:g} to {high:g}"
    if hint not in (int, float, str, bool, NoneType):
        return "a configuration"
    names = {
        int: f"a whole number from {low} to {high}",
        float: f"a number{within}",
        str: "text",
        bool: "true or false",
    }
    return "null" if hint is NoneType else names[hint]
