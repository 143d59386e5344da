"""Batches of frames of a clip, and what a causal convolution must remember from one batch to the next.

Shapes: clips `[B, C, F, H, W]` with `F` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from lowtide.activations.pages import Pages, RowStore
from lowtide.memory.rule import Tier


def frame_batches(frames: int, size: int) -> Iterator[slice]:
    """Batches of `size` frames; what is left over joins the first one, so a clip shorter than one is one batch.

    Thirteen frames by two are 3 + 2 + 2 + 2 + 2 + 2: the published video autoencoder's own order. Raises `ValueError`
    for no frames, and for a size that is no whole number from 1.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"Frames cannot be computed {size!r} at a time: give a whole number from 1. 2 is published.")
    if frames < 1:
        raise ValueError("A clip needs at least one frame, and this one has none.")
    first = frames - (max(frames // size, 1) - 1) * size
    yield slice(0, first)
    for start in range(first, frames, size):
        yield slice(start, start + size)


def batches_gone_through(x_BCFHW: torch.Tensor, batches: Iterable[slice]) -> Iterator[slice]:
    """All batches of a clip; on meta the first two and the last, since those between take no more memory."""
    if not x_BCFHW.is_meta:
        yield from batches
        return
    last: slice | None = None
    for place, batch in enumerate(batches):
        if place < 2:
            yield batch
        else:
            last = batch
    if last is not None:
        yield last


def frames_made(latent_frames: int, batch_size: int, ratio: int) -> int:
    """Frames that a causal decoder makes of latent frames, `batch_size` at a time; of an odd batch the first is one.

    With a `ratio` of 4 and batches of 2: of 13 latent frames 49, of 12 there are 48.
    """
    sizes = (batch.stop - batch.start for batch in frame_batches(latent_frames, batch_size))
    return sum(ratio * (size - size % 2) + size % 2 for size in sizes)


def latent_frames_made(frames: int, batch_size: int, ratio: int) -> int:
    """Latent frames that a causal encoder makes of frames, `batch_size` at a time; what is left of a batch is one."""
    return sum(-(-(batch.stop - batch.start) // ratio) for batch in frame_batches(frames, batch_size))


class FrameCache:
    """The last frames that each causal convolution saw: they stand before the next batch of frames.

    Convolutions ask in the order of the network, which is the same for every batch. Call `begin` before each batch.
    `size` is how many frames the batches after the first have, where it is known. A network that is computed row by row
    keeps its frames in `stores` on `pages`, by the same places.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        self.has_before = False
        self.is_last = False
        self.rows = Tier.DEVICE
        self.pages: Pages | None = None
        self.stores: dict[int, RowStore] = {}
        self._frames: dict[int, torch.Tensor] = {}
        self._place = 0
        self._begun = 0

    def batches(self, frames: int, size: int) -> Iterator[slice]:
        """The batches of a clip of so many frames, each begun as it is asked for."""
        for batch in frame_batches(frames, size):
            self.begin(is_last=batch.stop >= frames)
            yield batch

    def begin(self, *, is_last: bool) -> None:
        """A batch of frames begins; after the last one nothing is kept."""
        self.has_before = self._begun > 0
        self.is_last = is_last
        self._begun += 1
        self._place = 0

    def joined(self, x_BCFHW: torch.Tensor, frames: int) -> torch.Tensor:
        """The clip behind the `frames` frames that came before it; the first batch, behind its first one repeated."""
        if frames == 0:
            return x_BCFHW
        place, self._place = self._place, self._place + 1
        before = [self._before(place, x_BCFHW, frames)] if self.has_before else [x_BCFHW[:, :, :1]] * frames
        joined = torch.cat([*before, x_BCFHW], dim=2)
        if not self.is_last:
            source = x_BCFHW if x_BCFHW.shape[2] >= frames else joined
            self._keep(place, source[:, :, -frames:])
        return joined

    def _before(self, place: int, x_BCFHW: torch.Tensor, frames: int) -> torch.Tensor:
        return self._frames.pop(place)

    def _keep(self, place: int, frames_BCFHW: torch.Tensor) -> None:
        self._frames[place] = frames_BCFHW.clone()


def only_batch() -> FrameCache:
    """For a clip that is one batch."""
    cache = FrameCache()
    cache.begin(is_last=True)
    return cache
