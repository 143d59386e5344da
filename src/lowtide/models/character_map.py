"""The map of characters inside T5's tokenizers, checked: libraries follow it without looking where it leads.

Layout: four bytes, the trie's size (little endian); the trie, a double array of 32-bit units (as darts-clone writes
it); the texts that characters are replaced by, each ended by a zero byte, in UTF-8. A unit holds a label, the distance
to its children, and whether a value, the start of a text, stands there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.configs import CheckpointError

if TYPE_CHECKING:
    import numpy as np

BYTES_OF_UNIT = 4


def check_character_map(content: bytes, what: str) -> None:
    """Raise `CheckpointError` about `what` unless every text leads through the map without leaving it."""
    if not content:
        return
    size = int.from_bytes(content[:4], "little")
    if size % BYTES_OF_UNIT or not 0 < size <= len(content) - 4:
        raise CheckpointError(f"{what} is damaged: its trie claims {size} bytes, and the map has {len(content)}.")
    texts = content[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is damaged: its texts are not UTF-8: {error}") from error
    import numpy as np

    units = np.frombuffer(content[4 : 4 + size], "<u4")
    values = _values(units, what)
    starts = np.array([0, *(np.flatnonzero(np.frombuffer(texts, np.uint8) == 0) + 1)])
    if not np.isin(values, starts[starts <= len(texts)]).all():
        raise CheckpointError(f"{what} is damaged: its trie leads to the middle of a text.")


def _values(units: np.ndarray, what: str) -> np.ndarray:
    """The values of all that can be reached from the first unit; raises where the way leads out of the array."""
    import numpy as np

    children, first = _by_base(units)
    visited = np.zeros(len(units), bool)
    reached, values = np.zeros(1, np.int64), [np.zeros(0, np.int64)]
    while len(reached):
        visited[reached] = True
        bases = reached ^ _offsets(units[reached])
        if (bases | 255).max() >= len(units):
            raise CheckpointError(f"{what} is damaged: its trie leads out of itself.")
        has_value = (units[reached] >> 8 & 1).astype(bool) & (reached != 0)
        values.append((units[bases[has_value]] & 0x7FFFFFFF).astype(np.int64))
        bases = np.unique(bases)
        counts = first[bases + 1] - first[bases]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        reached = children[np.repeat(first[bases], counts) + within]
        reached = reached[~visited[reached]]
    return np.concatenate(values)


def _by_base(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The units that are children, in the order of their bases, and where those of each base begin.

    A unit of label L, at place p, can only be a child of the base p ^ L.
    """
    import numpy as np

    labels = (units & 0x800000FF).astype(np.int64)
    children = np.flatnonzero((labels > 0) & (labels < 256))
    bases = children ^ labels[children]
    order = np.argsort(bases, kind="stable")
    return children[order], np.searchsorted(bases[order], np.arange(len(units) + 1))


def _offsets(units: np.ndarray) -> np.ndarray:
    units = units.astype("int64")
    return (units >> 10) << ((units & 512) >> 6)
