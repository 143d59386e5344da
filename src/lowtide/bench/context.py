"""What a technique of the table may need to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """What a technique may need to know: where and in what to compute, the pictures' pixels, an empty folder."""

    device: torch.device
    dtype: torch.dtype
    width: int
    height: int
    batch: int
    folder: str
