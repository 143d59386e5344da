"""Budgets as people give them: bytes, "6GB", "80%" of what there is, "auto", or "-1GB" for what is free less 1 GB."""

from __future__ import annotations

import re

from lowtide.sizes import format_decimal, parse_bytes

AUTO_SHARE = 0.9
"""Of what is free: what "auto" takes."""
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", re.ASCII)
Asked = int | str | None
"""A budget as it is given: bytes, text, or None for no limit."""


def budget_bytes(asked: Asked, name: str, *, total: int, free: int) -> int | None:
    """The bytes meant by a budget called `name`, of `total` bytes there are and `free` ones; None for no limit.

    Raises `ValueError` for text that means nothing, shares over 100 %, and more to be left than is free.
    """
    if asked is None:
        return None
    text = asked.strip() if isinstance(asked, str) else asked
    if isinstance(text, str) and text.lower() == "auto":
        return int(free * AUTO_SHARE)
    if isinstance(text, str) and (share := _PERCENT.fullmatch(text)):
        if float(share[1]) > 100:
            raise ValueError(f"{name}={asked!r} is not possible: a share is at most 100 %.")
        return int(total * float(share[1]) / 100)
    try:
        if isinstance(text, str) and text.startswith("-"):
            return _left(parse_bytes(text[1:]), asked, name, free)
        return parse_bytes(text)
    except ValueError as error:
        if "is free" in str(error):
            raise
        raise ValueError(
            f"{name}={asked!r} is not possible: give bytes or a size such as '4GB', a share such as '80%', 'auto', or "
            "'-1GB' for what is free less 1 GB."
        ) from error


def check_budget(asked: Asked, name: str) -> None:
    """Raise `ValueError` now for a budget that no machine can have."""
    budget_bytes(asked, name, total=2**62, free=2**62)


def _left(spared: int, asked: int | str, name: str, free: int) -> int:
    if spared >= free:
        raise ValueError(f"{name}={asked!r} is not possible: only {format_decimal(free)} is free.")
    return free - spared
