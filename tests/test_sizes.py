"""Sizes in bytes, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.sizes import format_decimal, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * 2**30),
        ("4GB", 4 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        (".5kib", 512),
        (" 20 tb ", 20 * 10**12),
        ("7", 7),
        ("7 B", 7),
        (12, 12),
        (0, 0),
        ("0.1GB", 10**8),
        ("1.9999999B", 1),
    ],
)
def test_parse(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1 XB", "1e3", "1,5GB", "١GB", "9" * 5000, "1.2.3MB", "G6iB", True, None, 1.5]
)
def test_what_is_no_size_is_refused_with_the_forms_that_are(text):
    with pytest.raises(ValueError, match=r"512MB, 4GB, 6GiB"):
        parse_bytes(text)


def test_a_negative_integer_is_refused():
    with pytest.raises(ValueError, match="negative"):
        parse_bytes(-1)


@given(st.integers(min_value=0, max_value=2**50))
def test_what_is_written_reads_back_within_half_of_the_last_digit(count):
    number, unit = format_decimal(count).split()
    last_digit = 10 ** -len(number.partition(".")[2])
    assert abs(parse_bytes(format_decimal(count)) - count) <= 0.5 * last_digit * parse_bytes("1" + unit) + 1


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (6 * 10**9, "6.00 GB"),
        (6 * 2**30, "6.44 GB"),
        (910_000_000, "0.91 GB"),
        (99_000_000, "99.0 MB"),
        (12_300, "12.3 kB"),
        (1000, "1.0 kB"),
        (0, "0.0 kB"),
        (2 * 10**12, "2000.00 GB"),
        (-5000, "-5.0 kB"),
    ],
)
def test_decimal_sizes_are_those_that_budgets_are_written_in(count, said):
    assert format_decimal(count) == said
