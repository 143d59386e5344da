"""Build classes of `transformers` from files that may hold anything: whatever fails is a `CheckpointError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lowtide.configs import CheckpointError
from lowtide.models.foreign_configs import ForeignConfig

ForeignT = TypeVar("ForeignT", bound=ForeignConfig)


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


def read_foreign_config(folder: Path, entries_class: type[ForeignT], what: str) -> ForeignT:
    """The configuration in `config.json`. Raises `FileNotFoundError`, and `CheckpointError` if it is malformed."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name}, so it is not a {what} checkpoint.")
    return entries_class.from_file(file)
