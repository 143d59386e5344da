"""The ways in which an autoencoder can decode, set and put back."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowtide.activations.row_streaming import RowSettings, row_streaming_of
from lowtide.planning.workload import (
    BLENDED,
    EXACT,
    EXACT_ON_DISK,
    SLICED,
)


def can_go(vae: nn.Module, way: str, pictures: int) -> bool:
    """Whether an autoencoder has a way, other than the whole, to decode so many pictures at a time."""
    if way == SLICED:
        return pictures > 1 and hasattr(vae, "enable_slicing")
    return hasattr(vae, "enable_tiling") and hasattr(vae, "needs_tiles")


def set_way(vae: Any, way: str) -> None:
    """Have an autoencoder decode in one of the ways of `lowtide.planning.plan.WAYS`."""
    if not hasattr(vae, "enable_tiling") or way == _way_of(vae):
        return
    vae.disable_tiling()
    vae.disable_slicing()
    if way == SLICED:
        vae.enable_slicing()
    elif way in (EXACT, EXACT_ON_DISK):
        vae.enable_tiling("exact", rows=_ROWS[way])
    elif way == BLENDED:
        vae.enable_tiling("blended")


def _way_of(vae: Any) -> str | None:
    """The way that an autoencoder is in already, if it is as `set_way` makes it; its traces of rows are kept then."""
    streaming = row_streaming_of(vae.decoder)
    if streaming is not None and not vae.use_slicing:
        ways = {RowSettings.of(rows, None, None, None): way for way, rows in _ROWS.items()}
        return ways.get(streaming.settings)
    return None


_ROWS = {EXACT: "device", EXACT_ON_DISK: "disk"}


def ways_set(vae: Any) -> tuple[Any, ...]:
    """How an autoencoder decodes now, to be put back."""
    parts = (getattr(vae, "encoder", None), getattr(vae, "decoder", None))
    forwards = tuple(None if part is None else part.__dict__.get("forward") for part in parts)
    return getattr(vae, "use_slicing", False), getattr(vae, "tiles", None), parts, forwards


def put_ways_back(vae: Any, before: tuple[Any, ...]) -> None:
    """Have it decode as it did when `ways_set` was asked."""
    if not hasattr(vae, "enable_tiling"):
        return
    vae.disable_tiling()
    vae.use_slicing, vae.tiles, parts, forwards = before
    for part, forward in zip(parts, forwards, strict=True):
        if forward is not None:
            part.__dict__["forward"] = forward
