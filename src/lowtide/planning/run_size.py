"""The size of a run: pixels, pictures, frames and steps, on which its memory and time depend."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunSize:
    """`pictures` pictures or clips of `height` x `width` pixels, made from `prompts` prompts in `steps` steps.

    `frames` is None for pictures. With `guided` the network sees every picture twice. `output` is the run's
    `output_type`.
    """

    height: int
    width: int
    pictures: int = 1
    prompts: int = 1
    steps: int = 50
    guided: bool = True
    frames: int | None = None
    output: str = "pil"

    def to_dict(self) -> dict[str, Any]:
        """The size as a plan keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        count = f"{self.pictures} × " if self.pictures > 1 else ""
        frames = "" if self.frames is None else f" × {self.frames} frames"
        return f"{count}{self.width}x{self.height}{frames}, {self.steps} steps"
