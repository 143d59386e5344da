"""Terminals that cannot show every character: others are written in their place, where Python would raise an error."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

INSTEAD = {
    "×": "x", "·": ".", "•": "*", "…": "...", "→": "->", "–": "-", "—": "-", "−": "-", "Σ": "sum", "σ": "sigma",
    "≤": "<=", "≥": ">=", "±": "+-", "“": '"', "”": '"', "’": "'", "━": "-", "─": "-", "│": "|",
}  # fmt: skip
"""What is written for the characters of our own words; of others it is the letter below their accents, or "?"."""
HANDLER = "lowtide.instead"


def make_readable() -> None:
    """Let everything be written to stdout and stderr from now on, whatever their encodings are."""
    codecs.register_error(HANDLER, _instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_written(character) for character in text), error.end


def _written(character: str) -> str:
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return INSTEAD.get(character) or plain or "?"
