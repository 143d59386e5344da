"""The entries of CLIP's image processor, as published in `feature_extractor/preprocessor_config.json`, checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowtide.config_checks import LARGE, SMALLEST, Range, check_types
from lowtide.configs import Config
from lowtide.models.encoder_configs import MOST_PIXELS

RANGES: dict[str, Range] = {
    "resample": (0, 5),
    "image_mean": (-LARGE, LARGE),
    "image_std": (SMALLEST, LARGE),
    "rescale_factor": (SMALLEST, LARGE),
}
SIDES = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessorEntries(Config):
    """What pictures become before the safety checker looks at them."""

    do_resize: bool | None = True
    do_center_crop: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    do_convert_rgb: bool | None = True
    resample: int | None = 3
    rescale_factor: float | None = 1 / 255
    image_mean: float | tuple[float, ...] | None = None
    image_std: float | tuple[float, ...] | None = None
    size: Any = None
    crop_size: Any = None

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for one that is not possible."""
        check_types(self, "Image processor", RANGES)
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != 3:
                self._refuse(name, "it must be three numbers, one for each colour")
        for name in ("size", "crop_size"):
            value = getattr(self, name)
            sides = list(value.values()) if isinstance(value, dict) else [value]
            possible = all(side is None or (type(side) is int and 1 <= side <= MOST_PIXELS) for side in sides)
            if not possible or (isinstance(value, dict) and not (value and set(value) <= set(SIDES))):
                self._refuse(
                    name, f"it must be a number of pixels, up to {MOST_PIXELS}, or sides such as shortest_edge"
                )

    def _refuse(self, name: str, reason: str) -> None:
        raise ValueError(f"Image processor config: {name}={getattr(self, name)!r:.80} is not possible; {reason}.")
