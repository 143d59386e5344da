"""What a network is given beside its input: tensors without rows, and frames that it keeps from one call to the next.

Some video decoders compute a clip in batches of frames, and keep the last frames before each convolution in a list that
they fill (Wan), or in a dictionary that they return and are given again (CogVideoX). Row by row, `KeptRows` lie there
in place of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lowtide.activations.frame_cache import FrameCache, KeptRows
from lowtide.activations.graph import Value
from lowtide.activations.pages import Pages, RowStore
from lowtide.activations.recording import Trace
from lowtide.memory.rule import Tier

Beside = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call beside its input, by position and by name."""


@dataclass(frozen=True)
class KeptOfOne:
    """What the run of one clip keeps: rows of frames by their places, in pages that rest in a tier."""

    rows: dict[int, RowStore]
    pages: Pages
    tier: Tier


def given_tensors(beside: Beside) -> list[torch.Tensor]:
    """The tensors beside the input, in order."""
    return [leaf for leaf in tree_leaves(beside) if isinstance(leaf, torch.Tensor)]


def kept_rows(beside: Beside) -> list[KeptRows]:
    """The frames kept from the call before, in order."""
    return [leaf for leaf in tree_leaves(beside) if isinstance(leaf, KeptRows)]


def said(beside: Beside) -> str:
    """The arguments as far as a plan depends on them, as text."""

    def form(leaf: Any) -> Any:
        if isinstance(leaf, FrameCache):
            return leaf.has_before, leaf.is_last
        return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return repr(tree_map(form, beside))


def of_one(beside: Beside, place: int, count: int) -> Beside:
    """The arguments for one of a batch of `count`."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, KeptRows):
            return replace(leaf, pages=leaf.pages[place : place + 1], stores=leaf.stores[place : place + 1])
        is_batch = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == count
        return leaf[place : place + 1] if is_batch else leaf

    return beside if count == 1 else tree_map(part, beside)


def simulated(beside: Beside, trace: Trace) -> Beside:
    """The arguments of the call after this one, as far as they are known: flags say that a call is the first."""
    (others, after), (args, kwargs) = _with(trace, lambda value, _: KeptRows(value.shape, value.dtype)), beside
    flagless = {name: part for name, part in kwargs.items() if not isinstance(part, bool)}
    if others:
        return args, {**flagless, **{name: others[0] for name in kwargs if "cache" in name}}
    later = tuple(_filled(old, new) for old, new in zip(args, after[0], strict=True))
    return later, {name: _filled(part, after[1][name]) for name, part in flagless.items()}


def _filled(old: Any, new: Any) -> Any:
    return new if any(isinstance(leaf, KeptRows) for leaf in tree_leaves(new)) else old


def handed_back(output: torch.Tensor, beside: Beside, trace: Trace, kept: Sequence[KeptOfOne]) -> Any:
    """What the network would return: its output, and what it returns beside it. Lists that it fills are filled."""
    if trace.after is None:
        return output
    given = given_tensors(beside)

    def in_place_of(value: Value, place: int) -> Any:
        if value.given is not None:
            return given[value.given]
        stores = tuple(clip.rows[place] for clip in kept)
        return KeptRows(value.shape, value.dtype, kept[0].tier, tuple(clip.pages for clip in kept), stores)

    others, after = _with(trace, in_place_of)
    if others:
        return output, *others
    for old, new in zip((*beside[0], *beside[1].values()), (*after[0], *after[1].values()), strict=True):
        if isinstance(old, list):
            old[:] = new
        elif isinstance(old, dict):
            old.update(new)
    return output


def _with(trace: Trace, put: Any) -> Any:
    """What a traced call left, with something for each value; `put` is told the places of frames."""
    places = {value: place for place, value in trace.kept.items()}
    return tree_map_only(Value, lambda value: put(value, places.get(value)), trace.after)
