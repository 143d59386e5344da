"""Previews: latents as small pictures by a linear map, which is learned from the pictures that a model has made."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowtide.media.unfinished import whole_or_not

LONGEST = 128
"""Pixels of a preview's longer side, at most."""
RIDGE = 1e-3


class Previews:
    """The previews of a model with latents of `channels`; what is learned is in `file`; colours are false before."""

    def __init__(self, file: Path, channels: int | None = None) -> None:
        self._file, self._channels = file, channels
        try:
            self._sums = load_file(file)
        except (OSError, SafetensorError):
            self._sums = {}

    def png(self, latents: Any, width: int | None, height: int | None) -> str | None:
        """A PNG in base64 of the first of `latents`, for a picture of this size; None for what is no picture."""
        grid = latent_grid(latents, width, height, self._channels)
        if grid is None:
            return None
        colours = self._colours(grid)
        picture = Image.fromarray((colours * 255).round().to(torch.uint8).numpy())
        picture.thumbnail((LONGEST, LONGEST))
        content = io.BytesIO()
        picture.save(content, format="PNG")
        return base64.b64encode(content.getvalue()).decode()

    def learn(self, latents: Any, picture: Image.Image) -> None:
        """Learn from the last latents of a picture, and the picture."""
        grid = latent_grid(latents, *picture.size, self._channels)
        if grid is None:
            return
        rows, columns, _ = grid.shape
        small = picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
        colours = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(-1, 3).to(torch.float64) / 255
        features = _features(grid)
        sums = {"inner": features.T @ features, "outer": features.T @ colours}
        known = self._sums if self._sums and self._sums["inner"].shape == sums["inner"].shape else {}
        self._sums = {name: value + known[name] if known else value for name, value in sums.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not(self._file) as unfinished:
            save_file(self._sums, unfinished)

    def _colours(self, grid: torch.Tensor) -> torch.Tensor:
        """`[H, W, 3]` in [0, 1]."""
        features = _features(grid)
        if self._sums and len(self._sums["inner"]) == features.shape[1]:
            inner = self._sums["inner"]
            damping = RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
            colours = features @ torch.linalg.solve(inner + damping, self._sums["outer"])
        else:
            channels = features[:, [0, min(1, grid.shape[2] - 1), min(2, grid.shape[2] - 1)]]
            colours = (channels - channels.mean(0)) / (6 * channels.std(0) + 1e-6) + 0.5
        return colours.view(*grid.shape[:2], 3).clamp(0, 1)


def latent_grid(
    latents: Any, width: int | None, height: int | None, channels: int | None = None
) -> torch.Tensor | None:
    """The first of latents as `[H, W, C]` in float64; of a clip its first frame. None where they are no such grid.

    Known are `[B, C, H, W]`, clips `[B, C, F, H, W]` and `[B, F, C, H, W]`, and rows of patches `[B, H·W, C]`.
    """
    if not isinstance(latents, torch.Tensor) or not latents.numel():
        return None
    first = latents.detach()[0].to("cpu", torch.float64)
    if first.dim() == 4:
        first = first[:, 0] if first.shape[0] == channels else first[0]
    if first.dim() == 3:
        return first.movedim(0, -1)
    if first.dim() != 2 or not width or not height:
        return None
    rows = round((first.shape[0] * height / width) ** 0.5)
    if rows == 0 or first.shape[0] % rows:
        return None
    return first.view(rows, -1, first.shape[1])


def _features(grid: torch.Tensor) -> torch.Tensor:
    flat = grid.reshape(-1, grid.shape[2])
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
