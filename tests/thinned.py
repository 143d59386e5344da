"""Fewer cases of a product of parameters in the default run; all of them with `slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], most: int | None = None) -> list[Any]:
    """Parameters of every combination, `slow` but for one value of the last axis with each combination of the others.

    That value moves on by one from each of these to its neighbours, so that it meets all others of an axis beside one
    that is as long. With `most` only so many values are told apart: it is the second of four, then the fourth, too.
    """
    lists = [list(axis) for axis in axes]
    step, cases = most or len(lists[-1]), []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        is_kept = places[-1] % step == sum(places[:-1]) % step
        values = [axis[place] for axis, place in zip(lists, places, strict=True)]
        cases.append(pytest.param(*values, marks=() if is_kept else pytest.mark.slow))
    return cases
