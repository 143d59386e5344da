"""Build classes of `transformers` from files that may hold anything: whatever fails is a `CheckpointError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowtide.configs import read_json
from lowtide.weights.index import CheckpointError


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a foreign class raises on files that it cannot read into a `CheckpointError` about `folder`."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder}: no {what} can be read from it: {error or type(error).__name__}") from error


def read_foreign_config(folder: Path, config_class: Any, what: str) -> Any:
    """The `config_class` in `config.json`. Raises `FileNotFoundError`, and `ValueError` if it is malformed."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name}, so it is not a {what} checkpoint.")
    content = read_json(file)
    with reading(folder, what):
        return config_class.from_dict(content)
