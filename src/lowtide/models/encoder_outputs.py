"""What the encoders of texts and pictures return: entries by name, by place, or as attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


class Entries:
    """Base of dataclasses whose fields are entries, those of None left out."""

    def keys(self) -> list[str]:
        """The names of the entries that are there."""
        fields: Any = self
        return [field.name for field in dataclasses.fields(fields) if getattr(self, field.name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries that are there."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass
class EncoderOutput(Entries):
    """States of the last layer `[B, L, C]`, and those of all layers from the embeddings on, if they were asked for."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass
class PooledEncoderOutput(Entries):
    """The same, and one vector for each text or picture, `pooler_output` `[B, C]`."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


def refuse_attentions(output_attentions: bool | None) -> None:
    """Raise `ValueError` where the weights of attention are asked for, which are never held."""
    if output_attentions:
        raise ValueError("output_attentions=True is not possible: kernels of attention never hold its weights.")
