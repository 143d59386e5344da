"""The ways in which an autoencoder decodes: at once, picture by picture, row by row, in blended tiles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.activations.row_streaming import RowSettings, row_streaming_of
from lowtide.planning.workload import BLENDED, EXACT, EXACT_ON_DISK, SLICED, WHOLE, Call, Work

ROWS = {EXACT: "device", EXACT_ON_DISK: "disk"}
"""Where rows rest, by the way."""


class DecodeWays:
    """Sets how an autoencoder decodes, and traces what each way takes; see `lowtide.fitting.subject.Ways`."""

    settings: Collection[str] = ("use_slicing", "tiles")

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def set(self, way: str) -> None:
        """Decode in one of the ways of `lowtide.planning.workload.WAYS`, if the autoencoder has ways at all."""
        if not hasattr(self._vae, "enable_tiling") or way == self._way_now():
            return
        self._vae.disable_tiling()
        self._vae.disable_slicing()
        if way == SLICED:
            self._vae.enable_slicing()
        elif way in ROWS:
            self._vae.enable_tiling("exact", rows=ROWS[way])
        elif way == BLENDED:
            self._vae.enable_tiling("blended")

    def _way_now(self) -> str | None:
        """The way it decodes by rows already, if it is as `set` makes it: the passes it has planned are kept then."""
        streaming = row_streaming_of(self._vae.decoder)
        if streaming is None or self._vae.use_slicing:
            return None
        ways = {RowSettings.of(rows, None, None, None): way for way, rows in ROWS.items()}
        return ways.get(streaming.settings)

    def now(self) -> tuple[Any, ...]:
        """How it decodes now, to be put back."""
        parts = (getattr(self._vae, "encoder", None), getattr(self._vae, "decoder", None))
        forwards = tuple(None if part is None else part.__dict__.get("forward") for part in parts)
        return getattr(self._vae, "use_slicing", False), getattr(self._vae, "tiles", None), parts, forwards

    def put_back(self, before: Any) -> None:
        """Decode as when `now` was asked."""
        if not hasattr(self._vae, "enable_tiling"):
            return
        self._vae.disable_tiling()
        self._vae.use_slicing, self._vae.tiles, parts, forwards = before
        for part, forward in zip(parts, forwards, strict=True):
            if forward is not None:
                part.__dict__["forward"] = forward

    def traced(
        self, names: Sequence[str], inputs: Sequence[torch.Tensor], trace: Callable[[], Call], whole: Work
    ) -> dict[str, Call]:
        """What the ways called `names` take that the autoencoder offers for this picture or clip."""
        calls: dict[str, Call] = {}
        for way in names:
            if not self._offers(way, len(inputs[0])):
                continue
            try:
                self.set(way)
                if way != BLENDED or self._vae.needs_tiles(inputs[0], self._vae.config.scale):
                    call = trace()
                    calls |= self._with_rows(call, whole) if way == EXACT_ON_DISK else {way: call}
            except ValueError:
                continue  # a network that does not go by rows
            finally:
                self.set(WHOLE)
        return calls

    def _offers(self, way: str, pictures: int) -> bool:
        if way == SLICED:
            return pictures > 1 and hasattr(self._vae, "enable_slicing")
        return hasattr(self._vae, "enable_tiling") and hasattr(self._vae, "needs_tiles")

    def _with_rows(self, call: Call, whole: Work) -> dict[str, Call]:
        vae = self._vae
        levels, itemsize = len(vae.config.block_out_channels), next(vae.parameters()).itemsize
        return by_rows(vae.decoder, call, whole, levels=levels, itemsize=itemsize)


def by_rows(decoder: nn.Module, call: Call, work: Work, *, levels: int, itemsize: int) -> dict[str, Call]:
    """Both ways by rows, of a call with its rows in a file: the `work` of the whole one, and moving the rows.

    Rows are written and read again at so many `levels`; numbers of the autoencoder have `itemsize` bytes.
    """
    streaming = row_streaming_of(decoder)
    assert streaming is not None
    widened = 2.0 if itemsize == 2 else 0.0  # norms of 16-bit numbers take 32 bits
    on_disk = replace(call, work=work + Work(touched=widened * work.touched + 2.0 * call.stored * levels))
    room = streaming.most_room
    return {EXACT: replace(on_disk, peak=call.peak + room, stored=0, paged=room), EXACT_ON_DISK: on_disk}
