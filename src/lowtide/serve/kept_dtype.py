"""The dtype that was chosen for a model is kept: a job that goes on after a restart gives the bits that it would have.

What is fastest may be measured otherwise another time, or on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lowtide.media.unfinished import whole_or_not


def kept_dtype(notes: Path, model: str, about: list[str], choose: Callable[[], str | None]) -> str | None:
    """The dtype that was chosen for a model, or else that which `choose` gives, kept in the folder `notes` from now on.

    `about` is what the choice is for: the model's place and the device. Of another one it is made anew. None is the
    files' own.
    """
    file = notes / f"{model}.dtype.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["about"] == about and isinstance(kept["dtype"], str | None):
            return kept["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none is kept, or no file of ours
    chosen = choose()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not(file) as unfinished:
        unfinished.write_text(json.dumps({"about": about, "dtype": chosen}), encoding="utf-8")
    return chosen
