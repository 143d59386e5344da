"""No work is lost when memory runs out: steps are begun anew under a smaller plan, and latents are kept in a file."""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from lowtide.memory.shortage import OutOfMemoryError, is_of_device, is_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")
ADVICE = "Give the pipeline a budget, as in pipe.fit(ram='auto'): it then goes on with a smaller plan by itself."


def resumed(stage: str) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Have a method, a part of the stage called so, begun anew under a smaller plan when memory runs out in it.

    The scheduler and the generators are as they were before then, so that the result is the same. Without a budget the
    error goes on its way, with advice.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def begun_anew(pipe: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            while True:
                state = None if pipe.plan is None else _State(pipe, (*args, *kwargs.values()))
                try:
                    return method(pipe, *args, **kwargs)
                except BaseException as error:
                    if not is_out_of_memory(error):
                        raise
                    if state is None:
                        error.add_note(ADVICE)
                        raise
                    reason = str(error).partition("\n")[0][:160] or type(error).__name__
                    of_host = not is_of_device(error, pipe._fit.device)
                # Here the error is gone, and with it the frames that held what was being made.
                state.put_back()
                if not pipe._shrink(stage, reason, of_host=of_host):
                    raise OutOfMemoryError(
                        f"Memory ran out in {stage!r} under the smallest plan there is ({reason}). Close other "
                        "programs, ask for less (size, pictures at once), or allow more, as in allow=('int8',)."
                    )

        return begun_anew

    return decorate


class _State:
    """What a step changes besides its result: the scheduler's state, and that of generators."""

    def __init__(self, pipe: Any, given: tuple[Any, ...]) -> None:
        self._scheduler = getattr(pipe, "scheduler", None)
        before = {} if self._scheduler is None else vars(self._scheduler)
        self._before = {name: copy.copy(value) if isinstance(value, list) else value for name, value in before.items()}
        generators = [one for value in given for one in (value if isinstance(value, (list, tuple)) else (value,))]
        given_ones = [one for one in generators if isinstance(one, torch.Generator)]
        known = [torch.default_generator, *given_ones]  # the default one draws where none is given
        self._generators = [(one, one.get_state()) for one in known]

    def put_back(self) -> None:
        if self._scheduler is not None:
            vars(self._scheduler).clear()
            vars(self._scheduler).update(self._before)
        for generator, state in self._generators:
            generator.set_state(state)


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
