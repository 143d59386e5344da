"""Checks of the numbers that a run is asked for, shared by pipelines and the command line; free of torch."""

from __future__ import annotations

import math
import numbers


def check_counts(**counts: int) -> None:
    """Raise `ValueError` unless all are whole numbers, at least 1; they are given by the caller's names for them."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r} is not possible: it must be a whole number, at least 1.")


def check_steps(steps: int, name: str = "num_inference_steps") -> None:
    """Raise `ValueError` unless there is at least one step; `name` is what the caller calls it."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name}={steps!r} is not possible: it must be a whole number, at least 1. 20 to 50 is usual.")


def check_rescale(guidance_rescale: float) -> None:
    """Raise `ValueError` unless the share of guidance that is rescaled is a finite number, at least 0."""
    is_number = isinstance(guidance_rescale, numbers.Real) and not isinstance(guidance_rescale, bool)
    if not is_number or not 0 <= guidance_rescale < math.inf:
        raise ValueError(f"guidance_rescale={guidance_rescale!r:.80} is not possible: 0 leaves it out, 0.7 is usual.")


def check_guidance(guidance_scale: float, name: str = "guidance_scale") -> None:
    """Raise `ValueError` unless the guidance is a finite number; `name` is what the caller calls it."""
    is_number = isinstance(guidance_scale, numbers.Real) and not isinstance(guidance_scale, bool)
    if not is_number or not math.isfinite(guidance_scale):
        raise ValueError(
            f"{name}={guidance_scale!r:.80} is not possible: it must be a finite number. 6 to 7.5 is usual, 1 turns "
            "guidance off."
        )
