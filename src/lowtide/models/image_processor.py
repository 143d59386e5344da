"""CLIP's image processor: pictures become what the safety checker looks at, resized, cut out and normalised."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image

from lowtide.configs import CheckpointError, write_json
from lowtide.models.image_processor_entries import ImageProcessorEntries
from lowtide.models.prepared_inputs import PreparedInputs

PROCESSOR_NAME = "preprocessor_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained with (Radford et al. 2021), by colour."""
SIDE = 224
Side = tuple[int, int]
"""Height and width."""


class CLIPImageProcessor:
    """Resizes pictures so that their shorter side fits, cuts out the middle, and normalises the colours.

    Layout: `preprocessor_config.json`. Shapes: pictures `[H, W, 3]` in, `pixel_values` `[B, 3, H, W]` out.
    """

    library: ClassVar[str] = "transformers"

    def __init__(self, config: ImageProcessorEntries) -> None:
        self.config = config
        self.size = sides(config.size, {"shortest_edge": SIDE}, "size", square=False)
        self.crop_size = sides(config.crop_size, {"height": SIDE, "width": SIDE}, "crop_size", square=True)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read the file in a folder. Raises `FileNotFoundError`, and `CheckpointError` for entries not possible."""
        file = Path(folder) / PROCESSOR_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}.")
        entries = ImageProcessorEntries.from_file(file)
        try:
            return cls(entries)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the file into a folder."""
        entries = {name: value for name, value in self.config.to_dict().items() if value is not None}
        own = {"image_processor_type": type(self).__name__, "size": self.size, "crop_size": self.crop_size}
        colours = {"image_mean": list(self._by_colour("mean")), "image_std": list(self._by_colour("std"))}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / PROCESSOR_NAME, {**entries, **own, **colours})

    def __call__(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None
    ) -> PreparedInputs:
        """Prepare pictures: `pixel_values` is a tensor for "pt", else a list of arrays `[3, H, W]`."""
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        values = [self.prepare(picture) for picture in pictures]
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r} is not possible: give 'pt' or None.")
        return PreparedInputs(pixel_values=values if return_tensors is None else torch.from_numpy(np.stack(values)))

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """One picture as numbers `[3, H, W]`."""
        config = self.config
        if config.do_convert_rgb:
            picture = picture.convert("RGB")
        if config.do_resize:
            height, width = fitted(self.size, (picture.height, picture.width))
            picture = picture.resize((width, height), resample=config.resample)
        pixels_HWC = np.asarray(picture)
        pixels_HWC = pixels_HWC[..., None] if pixels_HWC.ndim == 2 else pixels_HWC
        if config.do_center_crop:
            pixels_HWC = middle(pixels_HWC, (self.crop_size["height"], self.crop_size["width"]))
        if config.do_rescale:
            scale = 1 / 255 if config.rescale_factor is None else config.rescale_factor
            pixels_HWC = (pixels_HWC.astype(np.float64) * scale).astype(np.float32)
        if config.do_normalize:
            mean, std = (np.array(self._by_colour(name), dtype=np.float32) for name in ("mean", "std"))
            pixels_HWC = (pixels_HWC.astype(np.float32) - mean) / std
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))

    def _by_colour(self, name: str) -> tuple[float, ...]:
        value = getattr(self.config, f"image_{name}")
        if value is None:
            return MEAN if name == "mean" else STD
        return value if isinstance(value, tuple) else (value,) * 3


def sides(value: Any, usual: dict[str, int], name: str, *, square: bool) -> dict[str, int]:
    """The sides of a picture as the file says them; a single number is the shorter side, or both of a `square`."""
    if value is None:
        return usual
    if not isinstance(value, Mapping):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    given = {side: length for side, length in value.items() if length is not None}
    if set(given) != {"height", "width"} and (square or set(given) != {"shortest_edge"}):
        possible = "height and width" if square else "shortest_edge, or height and width"
        raise ValueError(f"Image processor config: {name}={value!r:.80} is not possible; it must have {possible}.")
    return given


def fitted(size: Mapping[str, int], whole: Side) -> Side:
    """Height and width after resizing: those given, or such that the shorter side is as given."""
    shorter = size.get("shortest_edge")
    if shorter is None:
        return size["height"], size["width"]
    longer = int(shorter * max(whole) / min(whole))
    return (longer, shorter) if whole[1] <= whole[0] else (shorter, longer)


def middle(pixels_HWC: np.ndarray, size: Side) -> np.ndarray:
    """The middle of a picture; black around it where it is smaller."""
    for axis, length in enumerate(size):
        whole = pixels_HWC.shape[axis]
        if whole < length:
            before = (length - whole + 1) // 2
            around = [(before, length - whole - before) if place == axis else (0, 0) for place in range(3)]
            pixels_HWC = np.pad(pixels_HWC, around)
        elif whole > length:
            first = (whole - length) // 2
            pixels_HWC = pixels_HWC.take(range(first, first + length), axis)
    return pixels_HWC
