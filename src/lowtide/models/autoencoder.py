"""The base of the autoencoders: encode and decode whole, in slices of a batch, in blended tiles, or exactly by rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowtide.activations.row_streaming import RowSettings, apply_row_streaming, remove_row_streaming, row_streaming_of
from lowtide.activations.run import RowSink
from lowtide.activations.tiling import Tiles, blended, gathered, sliced
from lowtide.memory.rule import Tier
from lowtide.models.mixin import ModelMixin
from lowtide.models.model_outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution
from lowtide.models.tile_attributes import TileAttribute
from lowtide.peer_names import refuse_arguments

TILING_MODES = ("blended", "exact")


class AutoencoderMixin(ModelMixin):
    """Base of the autoencoders: an `encoder` and a `decoder`, and how much of the work is done at once."""

    config: Any  # has `scale`: a latent is that many pixels wide and high
    encoder: nn.Module
    decoder: nn.Module
    use_slicing = False
    tiles: Tiles | None = None
    _chosen_tiles: Tiles | None = None

    def usual_tiles(self) -> Tiles:
        """The tiles that the published model is decoded in."""
        raise NotImplementedError

    @property
    def set_tiles(self) -> Tiles:
        """The tiles in use, or those that `enable_tiling` would use: the usual ones unless others were chosen."""
        return self.tiles or self._chosen_tiles or self.usual_tiles()

    @set_tiles.setter
    def set_tiles(self, tiles: Tiles) -> None:
        self._chosen_tiles = tiles
        if self.tiles is not None:
            self.tiles = tiles

    @property
    def use_tiling(self) -> bool:
        """Whether large pictures are decoded in tiles or by rows; assigned, it is `enable_tiling` or its opposite."""
        return self.tiles is not None or row_streaming_of(self.decoder) is not None

    @use_tiling.setter
    def use_tiling(self, use: bool) -> None:
        self.enable_tiling() if use else self.disable_tiling()

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of the latents of whole pictures or clips."""
        raise NotImplementedError

    def pixels(self, z: torch.Tensor) -> torch.Tensor:
        """The pictures or clips of latents, decoded whole."""
        raise NotImplementedError

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution over latents of pictures or clips `x`, `[B, 3, ..., H, W]`."""
        posterior = DiagonalGaussianDistribution(self._by_slices(self._encoded, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: Any = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """The pictures or clips `[B, 3, ..., H, W]` of latents `z` `[B, C, ..., H/8, W/8]`.

        `generator` has no effect: nothing is drawn.
        """
        sample = self._by_slices(self._decoded, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _by_slices(self, network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return sliced(network, x) if self.use_slicing and len(x) > 1 else network(x)

    def needs_tiles(self, x: torch.Tensor, scale: int) -> bool:
        """Whether a picture whose side is `scale` times that of `x` is larger than one tile."""
        tiles = self.tiles
        return tiles is not None and (x.shape[-2] * scale > tiles.height or x.shape[-1] * scale > tiles.width)

    def _encoded(self, x: torch.Tensor) -> torch.Tensor:
        if not self.needs_tiles(x, 1):
            return self.moments(x)
        assert self.tiles is not None
        scale = self.config.scale
        sides, steps = self.tiles.in_latents(scale)
        in_pixels = (sides[0] * scale, sides[1] * scale), (steps[0] * scale, steps[1] * scale)
        rows, columns = x.shape[-2] // scale, x.shape[-1] // scale
        x = x[..., : rows * scale, : columns * scale]  # pixels that do not fill a latent are left out
        return gathered(lambda write: blended(self.moments, x, *in_pixels, steps, write), rows)

    def _decoded(self, z: torch.Tensor) -> torch.Tensor:
        if not self.needs_tiles(z, self.config.scale):
            return self.pixels(z)
        return gathered(lambda write: self.write_tiles(z, write), z.shape[-2] * self.config.scale)

    def check_decoding(self, shape: tuple[int, ...]) -> None:
        """Raise the `ValueError` or `OSError` that decoding latents of this shape row by row would raise."""
        streaming = row_streaming_of(self.decoder)
        if streaming is not None:
            streaming.check(shape)

    def write_tiles(self, z: torch.Tensor, write: RowSink) -> None:
        """Decode in tiles, and hand finished rows to `write`."""
        assert self.tiles is not None
        sides, steps = self.tiles.in_latents(self.config.scale)
        blended(self.pixels, z, sides, steps, (steps[0] * self.config.scale, steps[1] * self.config.scale), write)

    def enable_slicing(self) -> None:
        """Encode and decode one picture of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def enable_tiling(
        self,
        mode: str | bool = "blended",
        *,
        tile_size: int | tuple[int, int] | None = None,
        overlap: float | tuple[float, float] | None = None,
        rows: Tier | str | None = None,
        budget: int | str | None = None,
        work: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
        **tile_attributes: float | None,
    ) -> None:
        """Encode and decode large pictures in little memory.

        "blended" (or True): in tiles of `tile_size` pixels (height and width, or one number for both), of which a share
        `overlap` fades into the next tile; the defaults are those of `set_tiles`, which tile attributes given by name,
        such as `tile_sample_min_height`, set. Pictures up to one tile are done whole. False is `disable_tiling`. The
        tone may vary from tile to tile. "exact": row by row, with the result of the whole picture up to rounding; see
        `lowtide.apply_row_streaming` for `rows`, `budget`, `work` and `folder`. Each mode replaces the other.
        Raises `ValueError` for arguments that are not possible.
        """
        self._set_tile_attributes(tile_attributes)
        if mode is False:
            self.disable_tiling()
            return
        mode = "blended" if mode is True else mode
        if mode not in TILING_MODES:
            raise ValueError(f"mode={mode!r} is not possible: it is one of {', '.join(TILING_MODES)}.")
        stray = _given(tile_size=tile_size, overlap=overlap)
        if mode == "blended":
            stray = _given(rows=rows, budget=budget, work=work, folder=folder)
        if stray:
            raise ValueError(f"{', '.join(stray)} cannot be set for mode={mode!r}, only for the other mode.")
        if mode == "blended":
            tiles = self._tiles_of(tile_size, overlap)
            self.disable_tiling()
            self.tiles = tiles
            return
        settings = RowSettings.of(rows, budget, work, folder)
        self.disable_tiling()
        for part in (self.encoder, self.decoder):
            apply_row_streaming(part, **vars(settings))

    def _tiles_of(self, tile_size: int | tuple[int, int] | None, overlap: float | tuple[float, float] | None) -> Tiles:
        usual = self._chosen_tiles or self.usual_tiles()
        height, width = (usual.height, usual.width) if tile_size is None else both(tile_size)
        shares = (usual.overlap_height, usual.overlap_width) if overlap is None else both(overlap)
        return Tiles(height, width, *shares)

    def _set_tile_attributes(self, attributes: Mapping[str, float | None]) -> None:
        """Set tile attributes by name; raises `TypeError` for other names."""
        possible = {
            name for cls in type(self).__mro__ for name, part in vars(cls).items() if isinstance(part, TileAttribute)
        }
        refuse_arguments("enable_tiling", {name: value for name, value in attributes.items() if name not in possible})
        for name in possible & attributes.keys():
            if attributes[name] is not None:
                setattr(self, name, attributes[name])

    def disable_tiling(self) -> None:
        """Encode and decode pictures whole."""
        self.tiles = None
        remove_row_streaming(self.encoder)
        remove_row_streaming(self.decoder)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode pictures or clips `[B, 3, ..., H, W]`."""
        encoded = self.encode(sample)
        assert isinstance(encoded, AutoencoderKLOutput)
        posterior = encoded.latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)


def both(size: Any) -> tuple[Any, Any]:
    """A pair, or one number for both sides."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"{size!r} is not possible: give one number, or height and width.")
    return pair


def _given(**options: Any) -> list[str]:
    return [name for name, value in options.items() if value is not None]
