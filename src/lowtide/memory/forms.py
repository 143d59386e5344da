"""The nouns: tiers, forms and rules. A rule says how one module's weights rest and when they are brought to work.

Every memory plan of the library is such a rule: sequential offload is leaves with no prefetch, model offload the whole
module, group offload blocks or leaves with prefetch, partial residency a rule with `resident_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self


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
class Form:
    """A place, and the dtype that weights have there; None is the dtype they work in."""

    tier: Tier
    dtype: str | None = None


@dataclass(frozen=True)
class Rule:
    """How the weights of one module rest and work; sizes in bytes.

    `resident_bytes` of units, evenly spread over the module, rest on the device. `prefetch` units are loaded ahead.
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
    resident_bytes: int = 0
    host_bytes: int | None = None
    spill: bool = False
    spill_folder: str | None = None
    pin: bool = True
    block_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.blocks_per_group < 1:
            raise ValueError(f"blocks_per_group={self.blocks_per_group} is not possible: it is 1 or more.")
        if self.prefetch < 0:
            raise ValueError(f"prefetch={self.prefetch} is not possible: it is 0 or more.")
        for name in ("resident_bytes", "host_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it is 0 or more.")

    @property
    def resting(self) -> Form:
        """The form weights have between calls."""
        return Form(self.rest)

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON can hold it."""
        return {**asdict(self), "block_modules": None if self.block_modules is None else list(self.block_modules)}

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
        if given.get("block_modules") is not None:
            given["block_modules"] = tuple(given["block_modules"])
        return cls(**given)


NEVER_CAST = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
"""Patterns of the names of modules that are not cast where nothing else is asked for: they decide on quality."""


@dataclass(frozen=True)
class Casting:
    """How the weights of layers rest in 8 bits: convolutions, linear layers and embeddings, and only these.

    `storage` is "float8_e4m3fn", "float8_e5m2" or "int8". `scaled` gives each output channel a scale, so that its
    largest weight takes the largest 8-bit number: what is lost does not depend on how large the weights are, and biases
    stay as they are. Without it fp8 is a plain cast; int8 is always scaled. `compute` is the dtype that layers compute
    in (None: the one they have). Modules whose name matches a pattern (`re.search`) of `skip_patterns`, or whose class
    is one of `skip_classes`, are left out with all that is inside them; with neither, every module is cast.
    With `fp8_matmul` linear layers whose sides are multiples of 16 multiply in fp8, the input rounded too, where they
    compute in bfloat16: for GPUs of compute capability 8.9 or more. Raises `ValueError` for what is not possible.
    """

    storage: str = "float8_e4m3fn"
    scaled: bool = False
    fp8_matmul: bool = False
    compute: str | None = None
    skip_patterns: tuple[str, ...] = NEVER_CAST
    skip_classes: tuple[type, ...] = ()

    def __post_init__(self) -> None:
        if self.storage not in EIGHT_BITS:
            raise ValueError(f"storage={self.storage!r} is not possible: it is one of {', '.join(EIGHT_BITS)}.")
        if self.fp8_matmul and self.storage != "float8_e4m3fn":
            raise ValueError(f"fp8_matmul with storage={self.storage!r} is not possible: hardware takes float8_e4m3fn.")
        if self.storage == "int8":
            object.__setattr__(self, "scaled", True)


EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")
NAMED_CASTINGS = {"fp8": Casting("float8_e4m3fn", scaled=True), "int8": Casting("int8")}
