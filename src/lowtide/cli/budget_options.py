"""Budgets on the command line: `--vram`, `--ram`, `--disk` and `--allow`, for `generate` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lowtide.cli.errors import InputError
from lowtide.fitting.budgets import check_budget


class Allow(StrEnum):
    """What `--allow` knows: forms of weights and ways to decode that change the result, if by rounding alone."""

    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    BLENDED_TILING = "blended_tiling"
    PACKED = "packed"


@dataclass(frozen=True)
class Budget:
    """Budgets as they were typed; None for those left out. Raises `InputError` for text that means no size."""

    vram: str | None = None
    ram: str | None = None
    disk: str | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vram", "ram", "disk"):
            try:
                check_budget(getattr(self, name), name)
            except ValueError as error:
                raise InputError(f"--{name} {getattr(self, name)}: {_reason(error)}") from error

    def __str__(self) -> str:
        given = [f"--{name} {size}" for name in ("vram", "ram", "disk") if (size := getattr(self, name)) is not None]
        return " ".join([*given, *(f"--allow {name}" for name in self.allow)])


def budget_from(
    vram: str | None, ram: str | None, allow: Sequence[Allow], own_choice: Sequence[str] = ()
) -> Budget | None:
    """The budget that `generate` is given; None without one. `own_choice` are options that choose by hand.

    Raises `InputError` for both at once, and for `--allow` alone.
    """
    if vram is None and ram is None:
        if allow:
            raise InputError(f"--allow {allow[0].value} is for a budget: add --ram or --vram, such as --ram 4GB.")
        return None
    given = f"--vram {vram}" if vram is not None else f"--ram {ram}"
    if own_choice:
        raise InputError(
            f"{given} with {own_choice[0]}: give either a budget or your own choice. A budget chooses where weights "
            "rest and how to decode by itself; --allow packed, fp8, int8, int4 or blended_tiling lets it change the "
            "result."
        )
    return Budget(vram, ram, allow=tuple(dict.fromkeys(change.value for change in allow)))


def _reason(error: ValueError) -> str:
    """What is wrong, without the name of the argument, which the option says already."""
    said = str(error).partition(" is not possible: ")[2]
    return said[:1].upper() + said[1:] if said else str(error)
