"""A line on stderr before something that takes seconds and is done once: measuring this machine."""

from __future__ import annotations

import sys


def announce(text: str) -> None:
    """Say it at once; where there is no stderr, as in a program without a console, nothing is said."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
