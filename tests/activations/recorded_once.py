"""What is recorded of a network is kept for others that are alike, in this process: for tests of runs by rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowtide.activations import row_streaming
from lowtide.activations.kept_frames import said

_KEPT: dict[Any, Any] = {}
_TRACE = row_streaming.trace


@pytest.fixture(autouse=True)
def recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are made anew, with the same parts and other arguments of the same form, are recorded once."""
    monkeypatch.setattr(row_streaming, "trace", _kept)


def _kept(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    key = str(module), row_streaming._form(module), shape, dtype, said((args, kwargs))
    if key not in _KEPT:
        _KEPT[key] = _TRACE(module, shape, dtype, args, kwargs)
    return _KEPT[key]
