"""Figures that were measured once, kept in the user's cache folder. Without a folder they are measured every time."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.media.unfinished import whole_or_not

_LARGEST = 2**16
"""Bytes of a file that may be one of ours."""
_TOLD: set[Path | None] = set()
"""The folders of which it was said that nothing can be kept there: once is enough for all figures."""


def cache_folder() -> Path | None:
    """Where figures are kept: `lowtide` in `$XDG_CACHE_HOME`, or in `~/.cache`; None where there is no home."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(asked) if asked else Path.home() / ".cache") / "lowtide"
    except RuntimeError:  # no $HOME, and the user is in no list of users
        return None


def recall(name: str, key: list[Any]) -> Mapping[str, Any] | None:
    """The figures that were kept under `name` for `key`; None for anything else that may be in the file."""
    file = _file(name, key)
    try:
        if file is None or file.stat().st_size > _LARGEST:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, Mapping) or content.get("key") != key:
        return None
    figures = content.get("figures")
    return figures if isinstance(figures, Mapping) else None


def keep(name: str, key: list[Any], figures: Mapping[str, Any]) -> None:
    """Keep figures under `name` for `key`; warns where that is not possible."""
    file = _file(name, key)
    try:
        if file is None:
            raise OSError(None, "there is no home folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not(file) as unfinished:
            unfinished.write_text(json.dumps({"key": key, "figures": figures}, indent=2), encoding="utf-8")
    except OSError as error:
        if (folder := cache_folder()) in _TOLD:
            return
        _TOLD.add(folder)
        warnings.warn(
            f"What was measured of this machine cannot be kept ({error.strerror or error}), so it is measured again "
            "next time. Set XDG_CACHE_HOME to a folder that can be written to.",
            stacklevel=1,
        )


def _file(name: str, key: list[Any]) -> Path | None:
    folder = cache_folder()
    return folder and folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
