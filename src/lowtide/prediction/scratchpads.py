"""Scratchpads of oneDNN's kernels in half precision, as they were measured.

oneDNN 3.12, Xeon with AVX-512 and AMX, one thread, bfloat16. The sizes follow how oneDNN divides the work, not a
formula. Without AMX there are formulas.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Key = tuple[int, int]
"""Dimensions of a map, and the stride."""

WIDTHS: dict[Key, tuple[int, ...]] = {
    (2, 1): (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512),
    (3, 1): (8, 16, 32, 64, 128, 256),
    (2, 2): (8, 16, 32, 64, 128, 256),
}
PAGES: dict[Key, dict[int, tuple[int, ...]]] = {
    (2, 1): {
        4: (13, 14, 15, 17, 16, 17, 17, 17, 17, 19, 23),
        16: (12, 18, 20, 18, 20, 20, 20, 22, 28, 21, 54),
        32: (14, 20, 24, 24, 26, 24, 32, 34, 42, 70, 113),
        48: (20, 30, 34, 34, 32, 40, 46, 54, 64, 105, 153),
        64: (20, 24, 28, 30, 32, 40, 42, 54, 64, 98, 153),
        96: (26, 26, 30, 32, 38, 44, 198, 64, 200, 141, 177),
        128: (32, 48, 54, 40, 188, 54, 198, 82, 216, 153, 202),
        192: (44, 122, 200, 198, 202, 200, 220, 216, 282, 178, 250),
        256: (56, 160, 204, 200, 202, 216, 218, 220, 300, 202, 330),
        320: (66, 198, 212, 206, 220, 226, 238, 314, 372, 250, 501),
        384: (78, 202, 214, 206, 224, 220, 283, 302, 410, 250, 501),
        512: (102, 212, 216, 222, 222, 224, 302, 366, 446, 332, 665),
        640: (124, 206, 220, 210, 244, 318, 376, 456, 554, 412, 825),
        960: (182, 220, 228, 248, 360, 380, 514, 558, 828, 1105, 2211),
        1280: (216, 222, 220, 328, 384, 462, 560, 740, 1100, 1467, 2935),
        1920: (359, 1149, 1385, 2290, 2135, 2316, 2340, 2357, 3536, 4715, 9431),
        2560: (475, 1525, 1839, 3044, 2839, 3080, 3106, 3113, 4670, 6227, 12455),
    },
    (3, 1): {
        16: (18, 38, 38, 44, 48, 45),
        32: (26, 40, 56, 56, 82, 190),
        64: (44, 52, 70, 102, 144, 276),
        128: (78, 128, 104, 146, 228, 443),
        256: (148, 462, 582, 628, 642, 1285),
        512: (289, 923, 3383, 7258, 7197, 14395),
    },
    (2, 2): {
        16: (14, 24, 36, 52, 50, 66),
        32: (18, 38, 62, 62, 66, 90),
        64: (26, 66, 64, 66, 90, 138),
        128: (42, 70, 66, 90, 138, 556),
        256: (74, 238, 586, 578, 558, 652),
        512: (140, 468, 602, 562, 654, 1036),
        1280: (336, 626, 586, 822, 1298, 2597),
    },
}
"""Pages of 4096 bytes of a convolution with a kernel of 3 and channels last, by the channels that are read and, in a
row, by the widths in `WIDTHS`: the most of maps half as high as wide, as high, and twice as high, that become
16, 64, or as many channels as are read."""
INNER = (576, 864, 1008, 1440, 1584, 2016, 2448, 2880, 5760, 8640, 11520, 17280)
PRODUCTS: dict[int, dict[int, tuple[int, ...]]] = {
    128: {
        64: (152576, 226304, 332800, 373760, 517120, 521216, 437376, 406656, 529536, 480384, 529536, 529536),
        112: (153600, 227328, 332800, 374784, 517120, 522240, 470144, 440448, 440448, 440448, 440448, 440448),
        160: (152576, 226304, 332800, 373760, 517120, 521216, 793600, 742400, 382080, 406656, 414848, 406656),
        320: (152576, 226304, 332800, 373760, 517120, 521216, 793600, 742400, 357504, 357504, 365696, 365696),
        640: (152576, 226304, 332800, 373760, 517120, 521216, 793600, 742400, 1070208, 1070208, 1315968, 1217664),
        1280: (152576, 226304, 332800, 373760, 517120, 521216, 793600, 742400, 1397888, 1397888, 1643648, 1545344),
    },
    256: {
        64: (300032, 447488, 594944, 447616, 531584, 595072, 550016, 562304, 660608, 627840, 660608, 660608),
        112: (301056, 448512, 594944, 514176, 597120, 481408, 615552, 628864, 628864, 628864, 628864, 628864),
        160: (300032, 447488, 594944, 545920, 629888, 513152, 648320, 545920, 595072, 578688, 595072, 595072),
        320: (300032, 447488, 594944, 742400, 926720, 1037312, 627840, 578688, 578688, 595072, 595072, 595072),
        640: (300032, 447488, 594944, 742400, 926720, 1037312, 1379456, 1397888, 1643648, 1774720, 1840256, 1774720),
        1280: (300032, 447488, 594944, 742400, 926720, 1037312, 2034816, 2053248, 2299008, 2430080, 2495616, 2430080),
    },
}
"""Bytes of a product of a matrix `[M, K]` and one `[K, N]` that lies by rows, by N and M, in a row by K in `INNER`."""


def pages_of_scratch(key: Key, channels: int, width: int) -> int:
    """Pages that a convolution of so many channels takes, for maps so wide: an upper estimate between what is known.

    Beyond the largest numbers known the pages grow as those.
    """
    widths, table = WIDTHS.get(key, WIDTHS[2, 2]), PAGES.get(key, PAGES[2, 2])
    rows, columns = _around(list(table), channels), _around(widths, width)
    most = max(table[row][widths.index(column)] for row in rows for column in columns)
    beyond = max(1.0, channels / max(table)) * max(1.0, width / max(widths))
    return int(most * beyond) + 1 if beyond > 1 else most


def scratch_of_product(rows: int, inner: int, columns: int) -> int:
    """Bytes that a product of `[rows, inner]` and `[inner, columns]` takes, an upper estimate between what is known."""
    whole = 2 * _up(inner) * _up(columns) + 5 * 2**10 + (2**10 if columns <= 64 else 64 * inner) * (inner % 32 > 0)
    if columns <= 64 or inner < INNER[0]:
        return whole
    measured = [
        PRODUCTS[width][height][INNER.index(depth)]
        for width in _around(list(PRODUCTS), columns)
        for height in _around(list(PRODUCTS[128]), rows)
        for depth in _around(INNER, inner)
    ]
    return max(measured)


def _around(measured: Sequence[int], asked: int) -> Sequence[int]:
    """The number asked for, or its neighbours."""
    place = min(bisect_left(measured, asked), len(measured) - 1)
    return [measured[place]] if measured[place] <= asked else measured[max(0, place - 1) : place + 1]


def _up(number: int) -> int:
    return -(-number // 32) * 32
