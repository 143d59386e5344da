"""A network over a picture in blended tiles: less memory, but not the picture that the whole network would make.

Each tile is computed alone, so its norms take their statistics of the tile, and overlaps are cross-faded. Use row
streaming (`lowtide.activations.row_streaming`) where the picture must be that of the whole network.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowtide.activations.run import RowSink
from lowtide.whole_numbers import whole

Network = Callable[[torch.Tensor], torch.Tensor]
Sides = tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """A grid of tiles over a picture: height and width of a tile in pixels, and the share of each that overlaps.

    Raises `ValueError` for sizes and shares that are not possible.
    """

    height: int
    width: int
    overlap_height: float = 0.25
    overlap_width: float = 0.25

    def __post_init__(self) -> None:
        for side in (self.height, self.width):
            if (whole(side) or 0) < 1:
                raise ValueError(f"tile_size={side!r} is not possible: give a whole number, at least one pixel.")
        for share in (self.overlap_height, self.overlap_width):
            if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share < 1:
                raise ValueError(f"overlap={share!r} is not possible: give a share of the tile, from 0 to below 1.")

    def in_latents(self, scale: int) -> tuple[Sides, Sides]:
        """Height and width of a tile, and the steps from one tile to the next, in latents of `scale` pixels a side."""
        sides = (max(1, self.height // scale), max(1, self.width // scale))
        shares = (self.overlap_height, self.overlap_width)
        steps = [max(1, int(side * (1 - share))) for side, share in zip(sides, shares, strict=True)]
        return sides, (steps[0], steps[1])


def blended(network: Network, x: torch.Tensor, sides: Sides, steps: Sides, kept: Sides, write: RowSink) -> None:
    """Compute `network` in tiles of x `[B, C, ..., H, W]`, `sides` large and `steps` apart; cross-fade the overlaps.

    `kept` is `steps` in pixels of the output: the first `kept` rows and columns of a tile's result are its part of the
    output, and the others fade into the next tiles. Finished rows go to `write`. The edges of one row of tiles are kept
    in memory.
    """
    above: list[torch.Tensor] = []
    for top in range(0, x.shape[-2], steps[0]):
        edges: list[torch.Tensor] = []
        parts: list[torch.Tensor] = []
        before: torch.Tensor | None = None
        for place, left in enumerate(range(0, x.shape[-1], steps[1])):
            tile = network(x[..., top : top + sides[0], left : left + sides[1]])
            if above:
                _fade(above[place], tile, -2)
            if before is not None:
                _fade(before, tile, -1)
            edges.append(tile[..., kept[0] :, :].clone())
            before = tile[..., kept[1] :].clone()
            parts.append(tile[..., : kept[0], : kept[1]].clone())
            del tile
        above = edges
        write(top // steps[0] * kept[0], torch.cat(parts, dim=-1))


def _fade(edge: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Cross-fade the beginning of a tile with the end of the tile before it, in place."""
    extent = min(edge.shape[dim], tile.shape[dim])
    if extent == 0:
        return
    shape = [1] * tile.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=tile.device) / extent).to(tile.dtype).view(shape)
    start = tile.narrow(dim, 0, extent)
    start.copy_(edge.narrow(dim, 0, extent) * (1 - weight) + start * weight)


def sliced(network: Network, x: torch.Tensor) -> torch.Tensor:
    """Compute `network` for one picture of the batch at a time, into one output for the whole batch."""
    out: torch.Tensor | None = None
    for place, picture in enumerate(x.split(1)):
        result = network(picture)
        if out is None:
            out = result.new_empty((len(x), *result.shape[1:]))
        out[place] = result[0]
        del result  # else it would be alive beside the next result
    assert out is not None, "an empty batch"
    return out


def gathered(produce: Callable[[RowSink], None], rows: int) -> torch.Tensor:
    """The whole map of `rows` rows that `produce` writes."""
    out: list[torch.Tensor] = []

    def write(first: int, band: torch.Tensor) -> None:
        if not out:
            out.append(band.new_empty((*band.shape[:-2], rows, band.shape[-1])))
        out[0].narrow(-2, first, band.shape[-2]).copy_(band)

    produce(write)
    return out[0]
