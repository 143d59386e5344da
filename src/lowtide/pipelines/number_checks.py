"""Checks of the numbers that a run is asked for, shared by pipelines and the command line; free of torch.

Each gives the number as Python's own: numpy's are taken too, and could be neither saved nor told from arrays later.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from lowtide.whole_numbers import whole


def check_count(name: str, count: Any) -> int:
    """The number called `name`; raises `ValueError` unless it is whole, at least 1."""
    number = whole(count)
    if number is None or number < 1:
        raise ValueError(f"{name}={count!r:.80} is not possible: it must be a whole number, at least 1.")
    return number


def check_steps(steps: Any, name: str = "num_inference_steps") -> int:
    """The number of steps; raises `ValueError` unless there is at least one. `name` is what the caller calls it."""
    number = whole(steps)
    if number is None or number < 1:
        raise ValueError(
            f"{name}={steps!r:.80} is not possible: it must be a whole number, at least 1. 20 to 50 is usual."
        )
    return number


def check_rescale(guidance_rescale: Any) -> float:
    """The share of guidance that is rescaled; raises `ValueError` unless it is a finite number, at least 0."""
    is_number = isinstance(guidance_rescale, numbers.Real) and not isinstance(guidance_rescale, bool)
    if not is_number or not 0 <= float(guidance_rescale) < math.inf:
        raise ValueError(f"guidance_rescale={guidance_rescale!r:.80} is not possible: 0 leaves it out, 0.7 is usual.")
    return float(guidance_rescale)


def check_guidance(guidance_scale: Any, name: str = "guidance_scale") -> float:
    """The guidance; raises `ValueError` unless it is a finite number. `name` is what the caller calls it."""
    is_number = isinstance(guidance_scale, numbers.Real) and not isinstance(guidance_scale, bool)
    if not is_number or not math.isfinite(guidance_scale):
        raise ValueError(
            f"{name}={guidance_scale!r:.80} is not possible: it must be a finite number. 6 to 7.5 is usual, 1 turns "
            "guidance off."
        )
    return float(guidance_scale)
