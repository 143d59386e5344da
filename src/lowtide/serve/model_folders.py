"""The models in one folder: every subfolder that holds a model is one, by its own name."""

from __future__ import annotations

import re
from pathlib import Path

from lowtide.loading.model_index import MODEL_INDEX

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


def models_in(folder: Path) -> dict[str, str]:
    """The models in a folder, by name.

    Raises `ValueError` where there are none, for names that are no plain words, and for links out of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    found = sorted(model for model in folder.iterdir() if (model / MODEL_INDEX).is_file())
    if not found:
        raise ValueError(f"No folder in {folder} has a {MODEL_INDEX}.")
    for model in found:
        if not NAME.fullmatch(model.name):
            raise ValueError(f"{model}: a model's name has letters, digits, '.', '_' and '-' here. Rename the folder.")
        _check_links(model, folder.resolve())
    return {model.name: str(model) for model in found}


def _check_links(model: Path, root: Path) -> None:
    for path in (model, *model.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link out of {root}. Copy what it points to, or name the model by itself.")
