"""Pictures that come with a request: decoded within limits, and kept with their job."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from PIL import Image, ImageOps, UnidentifiedImageError

from lowtide.media.unfinished import whole_or_not
from lowtide.serve.limits import Limits
from lowtide.serve.problems import ProblemError

FORMATS = ("PNG", "JPEG", "WEBP")
ALPHA = ("RGBA", "LA", "PA")


class Uploads:
    """Pictures by the argument that they are for."""

    def __init__(self, pictures: Mapping[str, Sequence[Image.Image]]) -> None:
        self._pictures = pictures

    @classmethod
    def decoded(cls, files: Mapping[str, Sequence[bytes]], limits: Limits) -> Self:
        """Of files; raises `ProblemError` for those that are no pictures, and those that are too large."""
        return cls({name: [_decoded(file, name, limits) for file in many] for name, many in files.items() if many})

    @property
    def sizes(self) -> dict[str, list[tuple[int, int]]]:
        """Width and height of each."""
        return {name: [picture.size for picture in many] for name, many in self._pictures.items()}

    def write(self, folder: Path) -> dict[str, list[str]]:
        """Write them in a folder, and return their paths; raises `OSError` where that is not possible."""
        written: dict[str, list[str]] = {}
        for name, many in self._pictures.items():
            (folder / "given").mkdir(parents=True, exist_ok=True)
            for place, picture in enumerate(many):
                path = folder / "given" / f"{name}-{place}.png"
                with whole_or_not(path) as unfinished:
                    picture.save(unfinished, format="PNG")
                written.setdefault(name, []).append(str(path))
        return written


def _decoded(content: bytes, name: str, limits: Limits) -> Image.Image:
    """The picture upright, in RGB; of a mask in grey, where what is transparent is what may change."""
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = picture.size
        if width * height > limits.pixels:
            raise ProblemError(
                422, f"{name}: {width} x {height} is {width * height} pixels; {limits.pixels} are possible."
            )
        upright = ImageOps.exif_transpose(picture)
        if "mask" not in name:
            return upright.convert("RGB")
        is_alpha = upright.mode in ALPHA
        return ImageOps.invert(upright.getchannel("A")) if is_alpha else upright.convert("L")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ProblemError(422, f"{name} is no picture that can be read; possible are {', '.join(FORMATS)}.") from error
    except (OSError, SyntaxError, ValueError) as error:  # cut off or broken inside
        raise ProblemError(422, f"{name} cannot be read: {error}.") from error
