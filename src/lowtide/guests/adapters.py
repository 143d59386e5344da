"""LoRA files for a foreign pipeline that is loaded and has no budget yet: its own methods put them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowtide.guests.library import muted


def add_loras(pipe: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put on LoRAs, each a file and how much of it counts.

    Raises `ValueError` for a file that has nothing for this pipeline, and what the pipeline's own methods raise.
    """
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, (file, _) in zip(names, loras, strict=True):
        with muted():  # else it tells of each network that the file has nothing for
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
        if name not in {adapter for adapters in pipe.get_list_adapters().values() for adapter in adapters}:
            raise ValueError(f"{file} has no weights for the networks of a {type(pipe).__name__}.")
    pipe.set_adapters(names, [strength for _, strength in loras])
