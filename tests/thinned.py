"""Fewer cases of parameters and of their products in the default run; all of them with `slow`."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def only(names: Iterable[str], *kept: str) -> list[Any]:
    """Parameters of all names, `slow` but for those to keep."""
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in names]


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


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Parameters of every combination, `slow` but for as few as have each value of each axis once or more.

    For axes that take their own paths through the code, and cases that take long. The n-th of them has the n-th value
    of each axis, which begin anew where they end.
    """
    lists = [list(axis) for axis in axes]
    kept = {tuple(place % len(values) for values in lists) for place in range(max(map(len, lists)))}
    return [
        pytest.param(
            *(values[place] for values, place in zip(lists, places, strict=True)),
            marks=() if places in kept else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(values)) for values in lists))
    ]
