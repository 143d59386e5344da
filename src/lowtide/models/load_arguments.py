"""The arguments of loading that models and pipelines share: dtypes, devices, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowtide.memory.presets import execution_device

AskedDtypes = torch.dtype | str | Mapping[str, torch.dtype | str] | None
"""A dtype, "auto", or one for each component by name, with the others' as "default"."""


def check_not_pickled(use_safetensors: bool | None) -> None:
    """Raise `ValueError` where pickled weights are asked for."""
    if use_safetensors is False:
        raise ValueError("use_safetensors=False is not possible: pickled weights can run code, so they are refused.")


def chosen_dtypes(
    torch_dtype: AskedDtypes, dtype: AskedDtypes
) -> tuple[torch.dtype | None, dict[str, torch.dtype | None]]:
    """The dtype of a pipeline, and those of some components, asked for under either name; see `chosen_dtype`."""
    asked = torch_dtype if dtype is None else dtype
    if not isinstance(asked, Mapping):
        return chosen_dtype(torch_dtype, dtype), {}  # type: ignore[arg-type]
    if None not in (torch_dtype, dtype) and torch_dtype != dtype:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} differ; give one of them.")
    dtypes = {name: chosen_dtype(value, None) for name, value in asked.items()}
    return dtypes.pop("default", torch.float32), dtypes


def chosen_dtype(torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype asked for under either name: float32 if neither is given, None for "auto" (keep the file's)."""
    if torch_dtype is None and dtype is None:
        return torch.float32
    asked = {_floating_dtype(value) for value in (torch_dtype, dtype) if value is not None}
    if len(asked) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} differ; give one of them.")
    return asked.pop()


def mapped_device(device_map: Any, **placing: Any) -> torch.device | None:
    """The device that all networks are moved to when they are loaded: the GPU if there is one for "balanced".

    Raises `ValueError` for devices that are not there, for maps from networks to devices, and beside other arguments
    that say where weights are: `placing`, by name.
    """
    if device_map is None:
        return None
    beside = [name for name, value in placing.items() if value is not None]
    if beside:
        raise ValueError(f"device_map and {beside[0]} are not possible together: each says where weights are.")
    if isinstance(device_map, Mapping):
        raise ValueError(
            "device_map with a device for each network is not possible: all compute on one device. Give 'balanced', "
            "'cuda' or 'cpu', or a budget: vram=, ram=."
        )
    return execution_device(None if device_map in ("balanced", "auto") else device_map)


def _floating_dtype(asked: torch.dtype | str) -> torch.dtype | None:
    if asked == "auto":
        return None
    chosen = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(
            f"dtype={asked!r} is not possible: give torch.float32, torch.bfloat16, torch.float16 or 'auto'."
        )
    return chosen
