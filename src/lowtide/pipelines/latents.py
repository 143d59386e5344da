"""Latents in files: kept while they decode, and read again."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowtide.fitting.out_of_memory import OutOfMemoryError, is_out_of_memory


@contextmanager
def kept_safe(pipe: Any, latents: torch.Tensor) -> Iterator[None]:
    """While latents are decoded: they are in a file, which stays if that fails; `pipe.decode_saved` goes on from it.

    Under a budget the file is written before; else when memory has run out.
    """
    path = None if pipe.plan is None else save_latents(pipe, latents)
    try:
        yield
    except BaseException as error:
        if path is None and (is_out_of_memory(error) or isinstance(error, OutOfMemoryError)):
            path = save_latents(pipe, latents)
        if path is not None:
            error.add_note(f"The latents are kept in {path}: pipe.decode_saved({str(path)!r}) decodes them.")
        if isinstance(error, OutOfMemoryError):
            error.latents = path
        raise
    if path is not None:
        path.unlink(missing_ok=True)


def save_latents(pipe: Any, latents: torch.Tensor) -> Path | None:
    """Write latents to a new file in the temporary folder; None, with a warning, where that is not possible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = None
    try:
        handle, name = tempfile.mkstemp(prefix="lowtide-latents-", suffix=".safetensors")
        path = Path(name)
        os.close(handle)
        about = {"pipeline": type(pipe).__name__, "dtype": str(latents.dtype)}
        save_file({"latents": latents.detach().cpu().contiguous()}, name, metadata={"lowtide": json.dumps(about)})
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:  # a full disk is a SafetensorError
        if path is not None:
            path.unlink(missing_ok=True)
        warnings.warn(f"Latents cannot be kept in {tempfile.gettempdir()} while they decode: {error}", stacklevel=2)
        return None
    return path


def load_latents(pipe: Any, path: str | os.PathLike[str]) -> torch.Tensor:
    """The latents in a file that was kept; raises `FileNotFoundError` and `ValueError` for other files."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: latents are kept only where decoding them failed.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("lowtide", "{}"))
            if about.get("pipeline") != type(pipe).__name__ or "latents" not in file.keys():  # noqa: SIM118
                raise ValueError(f"{path} does not hold latents of a {type(pipe).__name__}.")
            return file.get_tensor("latents").to(pipe.device)
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold latents: {error}.") from error
