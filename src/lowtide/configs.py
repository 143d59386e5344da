"""Frozen configurations, read from and written to the `config.json` files of published checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object. Raises `ValueError`, naming the file, if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, sorted and indented as in published checkpoints."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def frozen(value: Any) -> Any:
    """JSON lists as tuples."""
    return tuple(frozen(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
