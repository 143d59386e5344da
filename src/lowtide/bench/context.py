"""What a technique of the table is told about its run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """What a technique is told: the device and dtype that compute, the pictures' size and number, an empty folder."""

    device: torch.device
    dtype: torch.dtype
    width: int
    height: int
    batch: int
    folder: str
