"""In which dtype to compute: the fastest of this processor among those that are right for a model.

It is chosen by measured speeds and the kind of a network's work. In which dtype weights rest is another matter: they
rest as their files have them, and are converted as they come to work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TypeVar

from lowtide.machine.dtype_speeds import DtypeSpeeds, dtype_speeds
from lowtide.planning.plan import BudgetError
from lowtide.planning.workload import WHOLE, Work, Workload

ON_CPU = ("float32", "bfloat16")
"""The dtypes that are right for every model on a CPU; where they are as fast, the first."""
AS_FAST = 1.03
"""A dtype that takes less than so many times the least seconds is as fast: then another one is not worth a change."""
SLOW = 3
"""Times the least seconds from which on a dtype that was asked for is told to be slow."""

D = TypeVar("D")
R = TypeVar("R")


class Kind(Enum):
    """What networks mostly compute, with the work of a typical step; numbers in place of bytes `touched`."""

    CONVOLUTIONS = Work(convolution=0.5e12, channels_last=0.05e12, product=0.3e12, attention=0.12e12, touched=1.5e9)
    PRODUCTS = Work(convolution=0.01e12, channels_last=0.03e12, product=0.8e12, attention=0.15e12, touched=1e9)

    @classmethod
    def of(cls, workload: Workload) -> Kind:
        """What a run mostly computes."""
        calls = [stage.ways[WHOLE].work.times(stage.calls) for stage in workload.stages]
        convolved = sum(work.convolution + work.channels_last for work in calls)
        return cls.CONVOLUTIONS if convolved > sum(work.product for work in calls) else cls.PRODUCTS


def seconds(kind: Kind, speeds: DtypeSpeeds) -> float:
    """Seconds of a typical step."""
    work = kind.value
    return (
        work.convolution / speeds.convolution
        + work.channels_last / speeds.channels_last
        + work.product / speeds.product
        + work.attention / speeds.attention
        + work.touched / speeds.touched
    )


def fastest_first(kind: Kind, possible: Sequence[str], speeds: Mapping[str, DtypeSpeeds] | None) -> tuple[str, ...]:
    """The dtypes that are `possible`, the fastest first; of those that are as fast, the one named first.

    As they are named where nothing was measured.
    """
    if speeds is None:
        return tuple(possible)
    taken = {name: seconds(kind, speeds[name]) for name in possible}
    least = min(taken.values())
    return tuple(sorted(possible, key=lambda name: 0.0 if taken[name] <= AS_FAST * least else taken[name]))


def ranked(kind: Kind, possible: Sequence[str]) -> tuple[str, ...]:
    """The same by this processor's own speeds, measured where there is a choice and they are not known."""
    return fastest_first(kind, possible, dtype_speeds()) if len(possible) > 1 else tuple(possible)


def times_as_long(speeds: Mapping[str, DtypeSpeeds] | None, kind: Kind = Kind.CONVOLUTIONS) -> dict[str, float]:
    """How many times as long a typical step takes in each dtype as in the fastest; nothing without speeds."""
    taken = {name: seconds(kind, speed) for name, speed in (speeds or {}).items()}
    return {name: each / min(taken.values()) for name, each in taken.items()}


def in_words(kind: Kind, dtype: str) -> str | None:
    """Why it is computed in a dtype, for a person; None where that was not measured."""
    speeds = dtype_speeds()
    if speeds is None or dtype not in speeds:
        return None
    others = [name for name in ON_CPU if name != dtype]
    factors = {name: seconds(kind, speeds[name]) / seconds(kind, speeds[dtype]) for name in others}
    said = ", ".join(f"{name} takes {_factor(factor)}× as long" for name, factor in factors.items())
    return f"Computing in {dtype}: by what was measured here, {said}."


def _factor(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"


_told: set[str] = set()


def slow_warning(kind: Kind, dtype: str) -> str | None:
    """What to say, once, of a dtype that was asked for and is slow on this processor; None where there is nothing."""
    speeds = dtype_speeds() if dtype not in _told else None
    if speeds is None or dtype not in speeds:
        return None
    _told.add(dtype)
    best, *_ = fastest_first(kind, ON_CPU, speeds)
    factor = seconds(kind, speeds[dtype]) / seconds(kind, speeds[best])
    if factor < SLOW:
        return None
    return f"{dtype} is slow on this processor: computing takes {_factor(factor)} times as long as in {best}."


def told_of(dtype: str) -> None:
    """Have nothing said of a dtype any more: it was chosen knowingly."""
    _told.add(dtype)


def first_that_fits(dtypes: Sequence[D], attempt: Callable[[D], R]) -> tuple[D, R]:
    """What the first of some dtypes gives in which a run fits its budgets, and that dtype.

    Where it fits in none, raises the `BudgetError` that needs the least.
    """
    refusals: list[BudgetError] = []
    for dtype in dtypes:
        try:
            return dtype, attempt(dtype)
        except BudgetError as refusal:
            refusals.append(refusal)
    raise min(refusals, key=lambda refusal: (refusal.minimum.vram or 0, refusal.minimum.ram or 0))
