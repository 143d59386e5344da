"""Scratchpads of oneDNN's half-precision convolutions of several entries, as they were measured.

oneDNN 3.12, Xeon with AVX-512 and AMX, one thread, bfloat16, channels last, kernels of 3, maps as high as wide up to 64
(clips: 32). The sizes follow how oneDNN divides the work, not a formula; they do not depend on the channels that are
made. Where there is no AMX they are smaller.
"""

from __future__ import annotations

from bisect import bisect_left

Key = tuple[int, int]
"""Dimensions of a map, and the stride."""

WIDTHS: dict[Key, tuple[int, ...]] = {
    (2, 1): (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512),
    (3, 1): (8, 16, 32, 64, 128, 256),
    (2, 2): (8, 16, 32, 64, 128, 256),
}
PAGES: dict[Key, dict[int, tuple[int, ...]]] = {
    (2, 1): {
        4: (12, 12, 14, 16, 14, 16, 16, 16, 16, 18, 22),
        16: (10, 14, 20, 18, 20, 20, 20, 22, 28, 21, 29),
        32: (12, 18, 22, 22, 24, 24, 32, 34, 42, 29, 105),
        48: (16, 28, 34, 30, 32, 36, 46, 54, 64, 49, 153),
        64: (16, 20, 26, 30, 30, 40, 42, 54, 64, 49, 153),
        96: (18, 26, 28, 30, 38, 44, 198, 64, 182, 141, 177),
        128: (22, 30, 30, 40, 46, 54, 198, 82, 216, 153, 201),
        192: (28, 68, 136, 198, 202, 200, 220, 216, 246, 177, 249),
        256: (34, 88, 178, 200, 202, 216, 218, 220, 300, 201, 329),
        320: (40, 108, 212, 206, 220, 204, 238, 314, 372, 249, 409),
        384: (46, 128, 214, 206, 224, 220, 248, 302, 410, 249, 489),
        512: (58, 166, 216, 222, 222, 224, 302, 366, 446, 331, 651),
        640: (72, 206, 220, 210, 244, 318, 376, 456, 554, 411, 811),
        960: (102, 220, 204, 216, 360, 380, 514, 558, 828, 613, 1213),
        1280: (134, 222, 220, 328, 384, 462, 560, 740, 1100, 815, 1615),
        1920: (198, 605, 1286, 2161, 1758, 2316, 2324, 2341, 2757, 1948, 2908),
        2560: (260, 801, 1708, 2873, 2336, 3080, 3090, 3113, 3665, 2592, 3872),
    },
    (3, 1): {
        16: (14, 24, 38, 38, 48, 45),
        32: (18, 38, 48, 50, 82, 69),
        64: (28, 42, 70, 102, 144, 129),
        128: (46, 74, 104, 146, 228, 443),
        256: (84, 246, 582, 628, 642, 589),
        512: (160, 487, 1735, 3359, 6607, 4076),
    },
    (2, 2): {
        16: (11, 16, 36, 44, 44, 66),
        32: (13, 24, 62, 62, 66, 90),
        64: (17, 40, 64, 66, 90, 138),
        128: (25, 70, 66, 90, 138, 556),
        320: (51, 164, 534, 598, 574, 812),
        512: (75, 256, 602, 562, 654, 1036),
        640: (93, 318, 628, 578, 816, 1294),
        1280: (177, 626, 586, 822, 1298, 2581),
    },
}
"""Pages of 4096 bytes, by the channels that are read and, in a row, by the widths in `WIDTHS`."""


def pages_of_scratch(key: Key, channels: int, width: int) -> int:
    """Pages that a convolution of so many channels takes, for maps so wide: an upper estimate between what is known.

    Beyond the largest numbers known the pages grow as those.
    """
    widths, table = WIDTHS.get(key, WIDTHS[2, 2]), PAGES.get(key, PAGES[2, 2])
    rows, columns = _around(list(table), channels), _around(list(widths), width)
    most = max(table[row][widths.index(column)] for row in rows for column in columns)
    beyond = max(1.0, channels / max(table)) * max(1.0, width / max(widths))
    return int(most * beyond) + 1 if beyond > 1 else most


def _around(known: list[int], asked: int) -> list[int]:
    """The number asked for, or its neighbours."""
    place = min(bisect_left(known, asked), len(known) - 1)
    return [known[place]] if known[place] <= asked else known[max(0, place - 1) : place + 1]
