"""The tiles of an autoencoder under the names that scripts for the peer assign, such as `vae.tile_sample_min_size`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.models.autoencoder import AutoencoderMixin


class TileAttribute:
    """Some numbers of the tiles that an autoencoder is set to, in pixels or in latents.

    A tile has one size: told in pixels or in latents, it is that of both.
    """

    def __init__(self, *parts: str, in_latents: bool = False) -> None:
        self._parts = parts
        self._in_latents = in_latents

    def __get__(self, vae: AutoencoderMixin, owner: type) -> float:
        """The number, of the first part where there are two."""
        value = getattr(vae.set_tiles, self._parts[0])
        return value // vae.config.scale if self._in_latents else value

    def __set__(self, vae: AutoencoderMixin, value: float) -> None:
        """Set it, for tiles in use too; raises `ValueError` for what is not possible."""
        number = value * vae.config.scale if self._in_latents else value
        vae.set_tiles = replace(vae.set_tiles, **dict.fromkeys(self._parts, number))
