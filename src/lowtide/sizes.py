"""Sizes as text: "6GB" read as 6000000000 bytes, and numbers of bytes written for people to read."""

from __future__ import annotations

import re

from lowtide.whole_numbers import whole

_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FACTORS = {"": 1, "B": 1, **_DECIMAL, **_BINARY}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?|\.\d{1,20})\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(size: str | int) -> int:
    """The number of bytes meant by `size`: an integer, or text such as "6GiB", "4GB", "512MB" or "1.5 GiB".

    GB is 10**9 bytes and GiB is 2**30; case does not matter. Raises `ValueError` for anything else.
    """
    number = whole(size)
    if number is not None:
        return _not_negative(number)
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{size!r} is not a size in bytes. Write a number and a unit: 512MB, 4GB, 6GiB or 1.5 GiB.")
    return _exact_product(match[1], factor)


def format_decimal(count: float) -> str:
    """`count` bytes in the units that budgets are written in: 6442450944 is "6.44 GB"; below 0.1 GB in MB, then kB."""
    unit, factor = next(
        ((unit, factor) for unit, factor in (("GB", 10**9), ("MB", 10**6)) if abs(count) >= factor / 10), ("kB", 10**3)
    )
    return f"{count / factor:.{2 if unit == 'GB' else 1}f} {unit}"


def _exact_product(digits: str, factor: int) -> int:
    whole, _, fraction = digits.partition(".")
    return (int(whole + fraction or "0") * factor) // 10 ** len(fraction)


def _not_negative(count: int) -> int:
    if count < 0:
        raise ValueError(f"A size cannot be negative, and this one is {count} bytes.")
    return count
