"""Python snippets of markdown files, and replacements in them that are listed and counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "snippets"
FENCE = "```"
RUN = "<!-- run -->"
HEADER = "# Under the heading: "


@dataclass(frozen=True)
class Snippet:
    """A block of Python: the heading it stands under, its text, the line of its first line, whether it is to be run."""

    heading: str
    code: str
    line: int
    is_run: bool = False


@dataclass(frozen=True)
class Replacement:
    """`old` becomes `new` in the `count` places where it stands, and `why`."""

    old: str
    new: str
    count: int
    why: str


def extract(markdown: str) -> list[Snippet]:
    """The Python blocks in order; `is_run` where the line right above the fence is `<!-- run -->`."""
    found: list[Snippet] = []
    heading, above = "", ""
    start: int | None = None  # index of the first line in the open block
    language = ""
    lines = markdown.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if start is None:
            if line.startswith(FENCE):
                start, language = index + 1, line.removeprefix(FENCE).strip().lower()
                is_run = above.strip() == RUN
            elif line.startswith("#"):
                heading = line.lstrip("#").strip()
            above = line
        elif line.rstrip() == FENCE:
            if language == "python":
                found.append(Snippet(heading, "".join(lines[start:index]), start + 1, is_run))
            start, above = None, line
    if start is not None:
        raise ValueError(f"the block from line {start} on is not closed")
    return found


def stored() -> list[Snippet]:
    """The document's snippets as we keep them, one file each, in the document's order."""
    found = []
    for path in sorted(FOLDER.glob("*.py.txt")):
        header, code = path.read_bytes().decode().split("\n", 1)
        found.append(Snippet(header.removeprefix(HEADER), code, 2))
    return found


def replaced(source: str, replacements: Sequence[Replacement]) -> str:
    """`source` with the replacements made and nothing else; `ValueError` if one is not found as often as it says."""
    result = source
    for one in replacements:
        found = source.count(one.old)
        if found != one.count:
            raise ValueError(f"{one.old!r} stands there {found} times, not {one.count}")
        result = result.replace(one.old, one.new)
    check_replaced(source, result, replacements)
    return result


def check_replaced(before: str, after: str, replacements: Sequence[Replacement]) -> None:
    """Raise `ValueError` unless `after` is `before`, byte for byte, but for one pass of the replacements."""
    table = {one.old: one.new for one in replacements}
    if not table:
        pieces = [before]
    else:
        pieces = re.split("(" + "|".join(re.escape(old) for old in sorted(table, key=len, reverse=True)) + ")", before)
    if "".join(table.get(piece, piece) for piece in pieces) != after:
        raise ValueError("more than the replacements has changed")
