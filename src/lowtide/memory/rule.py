"""The nouns: tiers, levels and rules. A rule says how one module's weights rest and when they are brought to work.

Every memory plan of the library is such a rule: sequential offload is leaves with no prefetch, model offload the whole
module, group offload blocks or leaves with prefetch, partial residency a rule with `resident_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

from lowtide.whole_numbers import whole

MOST_AHEAD = 16
"""Units that are loaded ahead where bytes limit them: looking for more takes time at each, and gains none."""


class Tier(StrEnum):
    """Where weights can be."""

    DISK = "disk"
    """The checkpoint's own file; for weights that are in none, an unnamed temporary file."""
    HOST = "host"
    """The machine's memory."""
    DEVICE = "device"
    """The memory that computing uses: of the accelerator, or, where there is none, the machine's."""


class Level(StrEnum):
    """What is brought to work at once."""

    WHOLE = "whole"
    BLOCK = "block"
    """The innermost repeated blocks; what is outside them goes leaf by leaf."""
    LEAF = "leaf"
    """Every module that holds weights itself."""


@dataclass(frozen=True)
class Rule:
    """How the weights of one module rest and work; sizes in bytes.

    `resident_bytes` of units, evenly spread over the module, rest on the device, or those that `resident_units` names:
    a plan knows for which of them computing would wait. `prefetch` units are loaded ahead. With `prefetch_bytes` these
    are instead as many as find room in so many bytes together with those in use; the largest unit always has room.
    `host_bytes` limits what rests in host memory: the rest of it is on disk. `spill` lets weights that are in no file
    be written to an unnamed file in `spill_folder` (None: the system's); without it they stay in host memory.
    `pin` lets host memory be locked for faster copies, where there is an accelerator.
    `block_modules` names the lists of blocks; None finds them.
    Raises `ValueError` for settings that are not possible.
    """

    level: Level = Level.BLOCK
    rest: Tier = Tier.HOST
    blocks_per_group: int = 1
    prefetch: int = 1
    prefetch_bytes: int | None = None
    resident_bytes: int = 0
    resident_units: tuple[str, ...] | None = None
    host_bytes: int | None = None
    spill: bool = False
    spill_folder: str | None = None
    pin: bool = True
    block_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("prefetch", "prefetch_bytes", "resident_bytes", "host_bytes")
        for name, least in (("blocks_per_group", 1), *((size, 0) for size in sizes)):
            given = getattr(self, name)
            number = whole(given)
            if given is not None and (number is None or number < least):
                raise ValueError(f"{name}={given!r:.80} is not possible: it is {least} or more.")
            object.__setattr__(self, name, number)

    @property
    def reach(self) -> int:
        """Units that may be loaded ahead, at most."""
        return self.prefetch if self.prefetch_bytes is None else MOST_AHEAD

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON can hold it."""
        lists = {name: getattr(self, name) for name in ("resident_units", "block_modules")}
        return {**asdict(self), **{name: None if names is None else list(names) for name, names in lists.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The rule that `to_dict` wrote; raises `ValueError` for other keys or values."""
        unknown = sorted(set(content) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"A rule has no {unknown}; it has {[field.name for field in fields(cls)]}.")
        given = dict(content)
        if "level" in given:
            given["level"] = Level(given["level"])
        if "rest" in given:
            given["rest"] = Tier(given["rest"])
        for name in ("resident_units", "block_modules"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)
