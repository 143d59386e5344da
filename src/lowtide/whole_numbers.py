"""Whole numbers as people give them: Python's own, numpy's, and any other that can count the items of a list."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any) -> int | None:
    """`value` as an `int`, or None if it is no whole number; True and False are none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
