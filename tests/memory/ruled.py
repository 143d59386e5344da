"""A module under every rule, by every way its weights come, with the lines of the library that its calls go through."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from tests.lines import Place, each_once, places
from tests.memory.cases import RULES, Case, own_bound, put, toy

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.casting.scratch import SCRATCH
from lowtide.memory.attach import Attachment


class Ruled(NamedTuple):
    """A rule; without `zero_copy` all weights go through the ring; with `is_cast` they rest in 8 bits."""

    rule: str
    zero_copy: bool = True
    is_cast: bool = False

    def __str__(self) -> str:
        return self.rule + ("" if self.zero_copy else " by ring") + (" cast" if self.is_cast else "")


CASES = [Ruled(rule, zero_copy) for rule in RULES for zero_copy in (True, False)]
CASES += [Ruled(rule, is_cast=True) for rule in ("sequential", "model", "leaves ahead")]


HEART = ("calls.py", "casting/cast_leaf.py", *(f"memory/{name}.py" for name in ("attach", "reader", "stream", "unit")))


def made(case: Ruled) -> tuple[Case, Attachment]:
    """The module under its rule, not called so far."""
    SCRATCH.release()
    module = toy(torch.float32)
    if case.is_cast:
        apply_casting(module.module, NAMED_CASTINGS["int8"])
    return module, ruled_again(module, case)


def ruled_again(module: Case, case: Ruled) -> Attachment:
    """The rule put on anew."""
    return put(module.module, RULES[case.rule], zero_copy=case.zero_copy)


@functools.cache
def expected(case: Ruled) -> torch.Tensor:
    """What the module gives under no rule."""
    module = toy(torch.float32)
    if case.is_cast:
        apply_casting(module.module, NAMED_CASTINGS["int8"])
    return module.run()


@functools.cache
def lines(case: Ruled) -> list[Place]:
    """The lines of a first and of a later call."""
    module, _ = made(case)
    return list(dict.fromkeys([*places(module.run), *places(module.run)]))


@functools.cache
def lines_once() -> Mapping[Ruled, list[Place]]:
    """Those of the files that hold what is under way, each in one case."""
    return each_once({case: [place for place in lines(case) if place.file in HEART] for case in CASES})


def is_bounded(attachment: Attachment) -> bool:
    """Whether the books say no more than the weights at rest and loaded ahead can take."""
    ledger = attachment.stream.ledger
    return ledger.in_use <= attachment.bound <= own_bound(attachment) and ledger.peak <= attachment.bound
