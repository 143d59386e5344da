"""A clip in batches of frames, and the frames that a causal convolution keeps from one batch to the next.

Shapes: clips `[B, C, F, H, W]` with `F` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.activations.pages import Pages, RowStore
from lowtide.memory.rule import Tier
from lowtide.whole_numbers import whole


def frame_batches(frames: int, size: int) -> Iterator[slice]:
    """Split a clip into batches of `size` frames; the first batch also takes the remainder.

    Thirteen frames in batches of two are 3 + 2 + 2 + 2 + 2 + 2, as in the published video autoencoder. A clip shorter
    than `size` is a single batch. Raises `ValueError` for a clip without frames, and for a size that is not a whole
    number of at least 1.
    """
    if (whole(size) or 0) < 1:
        raise ValueError(
            f"Frames cannot be computed {size!r} at a time: give a whole number of at least 1. 2 is published."
        )
    if frames < 1:
        raise ValueError("A clip needs at least one frame, and this one has none.")
    first = frames - (max(frames // size, 1) - 1) * size
    yield slice(0, first)
    for start in range(first, frames, size):
        yield slice(start, start + size)


def batches_gone_through(x_BCFHW: torch.Tensor, batches: Iterable[slice]) -> Iterator[slice]:
    """All batches of a clip; on meta only the first two and the last, since the others take no more memory."""
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
    """How many frames a causal decoder makes of latent frames, `batch_size` at a time.

    In a batch of odd size the first latent frame becomes one frame, and every other becomes `ratio` frames. With a
    `ratio` of 4 and batches of 2, 13 latent frames become 49 frames, and 12 become 48.
    """
    sizes = (batch.stop - batch.start for batch in frame_batches(latent_frames, batch_size))
    return sum(ratio * (size - size % 2) + size % 2 for size in sizes)


def latent_frames_made(frames: int, batch_size: int, ratio: int) -> int:
    """How many latent frames a causal encoder makes of frames, `batch_size` at a time.

    Every `ratio` frames of a batch become one latent frame, and so does the remainder.
    """
    return sum(-(-(batch.stop - batch.start) // ratio) for batch in frame_batches(frames, batch_size))


@dataclass(frozen=True, eq=False, repr=False)
class KeptRows:
    """Frames that a network keeps in a list or a dictionary until it is next called: their rows, in place of a tensor.

    `stores` and `pages` have one entry for every clip of a batch; `shape` is that of one. `tier` is where rows rest.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tier: Tier = Tier.DEVICE
    pages: tuple[Pages, ...] = ()
    stores: tuple[RowStore, ...] = ()

    def __repr__(self) -> str:
        return f"KeptRows({self.shape}, {self.dtype})"

    @property
    def meta_form(self) -> Any:
        """What a call on meta depends on; see `lowtide.prediction.repeats.ObjectForm`."""
        return self.shape, self.dtype, self.tier, tuple((pages.page_bytes, pages.state) for pages in self.pages)


class FrameCache:
    """The last frames that each causal convolution saw, which it puts before the next batch of frames.

    Convolutions are known by their place in the network's order, which is the same for every batch. Call `begin` before
    each batch. `size` is the number of frames of every batch after the first, or None where it is not known. A network
    that is computed row by row keeps its frames in `stores`, by the same places; `pages` holds their rows.
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
        """Split a clip of `frames` frames into batches, and call `begin` before each."""
        for batch in frame_batches(frames, size):
            self.begin(is_last=batch.stop >= frames)
            yield batch

    def begin(self, *, is_last: bool) -> None:
        """Begin a batch of frames; no frames of the last batch are kept."""
        self.has_before = self._begun > 0
        self.is_last = is_last
        self._begun += 1
        self._place = 0

    def joined(self, x_BCFHW: torch.Tensor, frames: int) -> torch.Tensor:
        """Put the last `frames` frames of the batch before in front of this batch.

        The first batch has its own first frame, repeated, in front of it.
        """
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
    """A cache for a clip that is a single batch."""
    cache = FrameCache()
    cache.begin(is_last=True)
    return cache
