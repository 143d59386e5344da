"""Frozen configurations, read from and written to the `config.json` files of published checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

MOST_CONFIG_BYTES = 2**20
"""The largest file of configurations that is read; published ones have a few kilobytes."""
MOST_DIGITS = 40
MOST_NAME = 200


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete or unusable; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Mapping[str, Any]):
    """Base of every configuration: a frozen dataclass that is a mapping too, as in `dict(config)` and `**config`.

    `unused` holds the entries of the source that the class does not know; they are written back by `to_dict`, so a
    scheduler's configuration survives a round trip through another class. Every entry is an attribute as well.
    """

    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    # Entry -> its possible values, the usual one first: entries without a field, since we build nothing else.
    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Read the known fields of `source` (JSON lists become tuples); the rest is kept in `unused`."""
        names = {field.name for field in dataclasses.fields(cls)} - {"unused"}
        values = {k: frozen(v) for k, v in source.items() if k in names}
        unused = {k: v for k, v in source.items() if k not in names and not k.startswith("_")}
        return cls(**values, unused=unused)

    @classmethod
    def from_file(cls, file: Path) -> Self:
        """Read a file of JSON. Raises `CheckpointError`, which names the file and the entry that is not possible."""
        content = read_json(file)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: every field, then the unknown entries of the source."""
        own = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "unused"}
        return {**self.unused, **own}

    @classmethod
    def usual(cls) -> dict[str, Any]:
        """The entries that need not be told: the usual values of `SUPPORTED`."""
        return {key: possible[0] for key, possible in cls.SUPPORTED.items()}

    def _entries(self) -> dict[str, Any]:
        return {**self.usual(), **self.to_dict()}

    def __getitem__(self, key: str) -> Any:
        entries = self._entries()
        if key not in entries:
            raise KeyError(f"{type(self).__name__} has no entry {key!r}; it has {sorted(entries)}")
        return entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    if not TYPE_CHECKING:  # a checker would take every name for an entry

        def __getattr__(self, name: str) -> Any:
            """The entry `name` of the source that is no field."""
            entries = {**self.usual(), **self.__dict__.get("unused", {})}
            if name not in entries:
                raise AttributeError(f"{type(self).__name__} has no entry {name!r}.")
            return entries[name]


def read_json(file: Path, most_bytes: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """Read a file with one JSON object; it may hold anything, so what it can make us do is bounded.

    Raises `FileNotFoundError`, and `CheckpointError` that names the file (and the entry, where one is to blame) if it
    is larger than `most_bytes`, is no JSON, or holds a number that is NaN or has too many digits.
    """
    content = parse_json(file, read_bounded(file, most_bytes))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_bounded(file: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file. Raises `CheckpointError` if it is none, or is larger than `most_bytes`."""
    check_size(file, most_bytes)
    with file.open("rb") as stream:
        return stream.read(most_bytes)


def check_size(file: Path, most_bytes: int) -> int:
    """The size of a file, which is not opened: opening a pipe would wait for ever.

    Raises `CheckpointError` if it is no regular file, or is larger than `most_bytes`.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: not a regular file.")
    if status.st_size > most_bytes:
        raise CheckpointError(f"{file}: {status.st_size} bytes; at most {most_bytes} are allowed in such a file.")
    return status.st_size


def parse_json(file: Path, content: bytes) -> Any:
    """What the JSON in a file says; raises `CheckpointError` that names the file."""
    try:
        return json.loads(
            content.decode("utf-8"), parse_int=_whole, parse_constant=_constant, object_pairs_hook=_checked_object
        )
    except _EntryError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors too
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, sorted and indented as in published checkpoints."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _EntryError(Exception):
    """An entry of a JSON object is not possible; the message names it."""


@dataclasses.dataclass(frozen=True)
class _Refused:
    """Stands for a value until the object around it, which knows the entry's name, is whole."""

    reason: str


def _whole(text: str) -> int | _Refused:
    return int(text) if len(text) <= MOST_DIGITS else _Refused(f"a number of {len(text)} digits ({text[:8]}…)")


def _constant(text: str) -> float | _Refused:
    # published schedulers have an entry of -Infinity
    return _Refused("NaN, which is no number") if text == "NaN" else float(text)


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in pairs:
        refused = _refused_in(value)
        if refused is not None:
            raise _EntryError(f"{name[:MOST_NAME]} is {refused.reason}.")
    return dict(pairs)


def _refused_in(value: Any) -> _Refused | None:
    if isinstance(value, list):
        return next((refused for refused in map(_refused_in, value) if refused is not None), None)
    if isinstance(value, float) and math.isnan(value):
        return _Refused("NaN, which is no number")
    return value if isinstance(value, _Refused) else None


def frozen(value: Any) -> Any:
    """JSON lists as tuples."""
    return tuple(frozen(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
