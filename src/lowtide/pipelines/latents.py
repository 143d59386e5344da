"""Latents in files: kept while they decode, and read again."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from lowtide.media.unfinished import remove_stale, writer

_PREFIX, _SUFFIX = "lowtide-latents-", ".safetensors"
_NAMES = re.compile(rf"{_PREFIX}(?:([0-9a-f]{{8}})-(\d{{1,9}})-)?\w{{8}}{re.escape(_SUFFIX)}")
"""Of files while latents decode, which a process owns, and of those kept on purpose, which nobody does."""
_run: ContextVar[Mapping[str, Any] | None] = ContextVar("run", default=None)


@contextmanager
def telling_latents(run: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, files of latents also say `run`, which JSON can hold; `run_of_latents` reads it again."""
    before = _run.get()
    try:
        _run.set(run)
        yield
    finally:
        _run.set(before)


@contextmanager
def kept_safe(pipe: Any, latents: torch.Tensor, saved: Path | None = None) -> Iterator[None]:
    """While latents are decoded: if that fails or is interrupted they are in a file, a week long.

    `latents` of the exception is that file, and a note names it; `pipe.decode_saved` goes on from it. Under a budget
    it is written before, since there may be no memory left after. Those of the file `saved` are in one already. What
    processes that are gone left of latents is removed, and what was kept more than a week ago.
    """
    path = None
    with suppress(OSError):  # no folder for temporary files: `save_latents` says so
        remove_stale(Path(tempfile.gettempdir()), _NAMES)
    try:
        if pipe.plan is not None and saved is None:
            path = save_latents(pipe, latents)
        yield
        if path is not None:
            _remove(path)
    except BaseException as error:
        kept = saved or _kept(path if path is not None and path.exists() else save_latents(pipe, latents))
        if kept is not None:
            _name(error, kept)
        raise


def save_latents(pipe: Any, latents: torch.Tensor) -> Path | None:
    """Write latents to a new file in the temporary folder; None, with a warning, where that is not possible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = None
    try:
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{writer()}-", suffix=_SUFFIX)
        path = Path(name)
        os.close(handle)
        about = {"pipeline": type(pipe).__name__, "dtype": str(latents.dtype), "run": _run.get()}
        save_file({"latents": latents.detach().cpu().contiguous()}, name, metadata={"lowtide": json.dumps(about)})
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        # a full disk is a SafetensorError
        if not isinstance(error, (OSError, SafetensorError, MemoryError, RuntimeError)):
            raise
        warnings.warn(f"Latents cannot be kept in a temporary file while they decode: {error}", stacklevel=2)
        return None
    return path


def load_latents(pipe: Any, path: str | os.PathLike[str]) -> torch.Tensor:
    """The latents in a file that was kept; raises `FileNotFoundError` and `ValueError` for other files."""
    from safetensors import safe_open

    if _about(path).get("pipeline") != type(pipe).__name__:
        raise ValueError(f"{path} does not hold latents of a {type(pipe).__name__}.")
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents").to(pipe.device)


def run_of_latents(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What `telling_latents` was given for the latents in a file; raises as `load_latents` does."""
    return _about(path).get("run")


def _about(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: latents are kept for a week, where decoding them failed.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("lowtide", "{}"))
            has_latents = "latents" in file.keys()  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold latents: {error}.") from error
    return about if has_latents and isinstance(about, Mapping) else {}


def _kept(path: Path | None) -> Path | None:
    """The file under the name of one that no process owns."""
    if path is None:
        return None
    kept = path.with_name(f"{_PREFIX}{path.stem[-8:]}{_SUFFIX}")
    try:
        return path.rename(kept)
    except OSError as error:
        warnings.warn(f"{path} cannot be named {kept.name} ({error}): copy it, for it is removed soon.", stacklevel=2)
        return path


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # what was decoded is worth more
        warnings.warn(f"The latents in {path} are no longer needed, and cannot be removed: {error}", stacklevel=2)


def _name(error: BaseException, kept: Path) -> None:
    said = f"The latents are kept in {kept}: pipe.decode_saved({str(kept)!r}) decodes them."
    error.latents = kept  # type: ignore[attr-defined]
    error.add_note(said)
    if isinstance(error, SystemExit):  # which Python ends with in silence
        warnings.warn(said, stacklevel=2)
