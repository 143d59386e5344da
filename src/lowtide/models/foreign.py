"""Have other libraries read files that may hold anything: whatever fails is a `CheckpointError`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowtide.configs import CheckpointError, write_json
from lowtide.models.put_weights import resting_state
from lowtide.weights.save import save_tensors

MOST_SAID = 400
"""Letters of a foreign error that ours repeats."""
PANIC = "PanicException"
"""The class of what libraries written in Rust raise where they give up; it is no `Exception`, and has no module."""


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a foreign class raises on files that it cannot read into a `CheckpointError` about `folder`."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        said = " ".join((str(error) or type(error).__name__).split())
        raise CheckpointError(f"{folder}: no {what} can be read from it: {said[:MOST_SAID]}") from error


def is_of_transformers(component: object) -> bool:
    """Whether a component is a network of `transformers`, which a script gave us; the library is not imported."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(component, library.PreTrainedModel)


def save_foreign(component: Any, folder: Path, *, variant: str | None, max_shard_size: int | str | None) -> None:
    """Write a network of `transformers` into an existing folder, its weights as they rest."""
    write_json(folder / "config.json", component.config.to_dict())
    tensors = {_published(component, name): tensor for name, tensor in resting_state(component).items()}
    save_tensors(tensors, folder, "model", variant=variant, max_shard_size=max_shard_size)


def _published(component: object, name: str) -> str:
    """Checkpoints of CLIP's text model are published with a prefix that transformers 5 dropped from the class."""
    prefixed = type(component).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
    return f"text_model.{name}" if prefixed else name
