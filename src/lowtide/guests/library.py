"""The door to diffusers: its classes by name, and what to install where it is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lowtide.configs import CheckpointError
from lowtide.loading.model_index import ComponentSpec
from lowtide.quiet import quiet

LIBRARIES = ("diffusers", "transformers")
INSTALL = "pip install 'lowtide[guests]'"


class NoGuestsError(ImportError):
    """Pipelines of diffusers are asked for, and it is not installed."""


def place_of_diffusers(asked: str) -> Path:
    """The folder of the library, which is not imported. Raises `NoGuestsError` as `diffusers` does."""
    try:
        spec = importlib.util.find_spec("diffusers")
    except ImportError as error:
        raise _not_installed(asked) from error
    if spec is None or spec.origin is None:
        raise _not_installed(asked)
    return Path(spec.origin).parent


def diffusers(asked: str) -> ModuleType:
    """The library. Raises `NoGuestsError`, which names what was `asked` for, where it is not installed."""
    try:
        with quiet():
            return importlib.import_module("diffusers")
    except ImportError as error:
        raise _not_installed(asked) from error


def _not_installed(asked: str) -> NoGuestsError:
    return NoGuestsError(f"{asked} is served through diffusers, which is not installed: {INSTALL}")


@contextmanager
def muted() -> Generator[None]:
    """While this lasts, diffusers logs nothing but errors; the level is the whole process's."""
    library = sys.modules.get("diffusers")
    if library is None:
        yield
        return
    messages = library.utils.logging
    before = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(before)


def pipeline_class(name: str) -> type[Any]:
    """The class of a pipeline. Raises `NoGuestsError`, and `CheckpointError` for a class that there is not."""
    library = diffusers(f"A {name}")
    found = getattr(library, name, None)
    if not isinstance(found, type) or not issubclass(found, library.DiffusionPipeline):
        raise CheckpointError(
            f"The model_index.json names the pipeline {name!r}, which diffusers {library.__version__} does not have. "
            "Code in a checkpoint's folder is never run: install a version of diffusers that has it."
        )
    return found


def component_class(file: Path, spec: ComponentSpec) -> type[Any]:
    """The class of a component; of the libraries that pipelines are made of alone, whatever a file names.

    Raises `CheckpointError` for others.
    """
    library = diffusers(f"{spec.class_name}")
    if spec.library in LIBRARIES:
        module: Any = importlib.import_module(spec.library)
    else:
        module = getattr(library.pipelines, spec.library, None)
    found = getattr(module, spec.class_name, None)
    if not isinstance(found, type) or not found.__module__.startswith(LIBRARIES):
        raise CheckpointError(
            f"{file}: entry {spec.name!r} is a {spec.class_name!r} of {spec.library!r}, which neither diffusers nor "
            f"transformers has; other code is never run. Load it yourself and pass it in: load(..., {spec.name}=...)."
        )
    return found
