"""How a command ends when something is wrong: a short message on stderr and an exit code, no traceback.

Exit codes: 1 the run failed, 2 the input cannot be used, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from lowtide.guests.library import NoGuestsError

RUN_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

_FOREIGN = (TypeError, ValueError, AttributeError, LookupError, AssertionError, ImportError, OSError)
_LIBRARIES = ("diffusers", "transformers", "peft")
_DEBUG_HINT = "Run again with LOWTIDE_DEBUG=1 to see where this comes from."


class InputError(Exception):
    """What the user asked for cannot be done: the message says what is possible and what to try."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything on the way up tidies as after Ctrl-C."""


@contextmanager
def reported(*, debug: bool, has_budget: bool = False) -> Generator[None]:
    """End the command with a message and an exit code when the block raises; with `debug`, let the error through.

    SIGTERM ends the block as Ctrl-C does. `has_budget` decides what is advised when memory runs out.
    """
    try:
        with _sigterm_raises():
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        tell("\n".join(["Stopped. No half-written file is left behind.", *_way_on(error)]))
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        tell(f"Error: {_message(error, has_budget=has_budget)}")
        raise typer.Exit(_exit_code(error)) from None


@contextmanager
def in_one_line(name: str, hint: str = "") -> Generator[None]:
    """What code of other libraries says of its arguments and files, before anything is computed, as an `InputError`.

    `name` is put before it, and a `hint` behind it.
    """
    try:
        yield
    except _FOREIGN as error:
        if not _is_of_others(error):
            raise
        said = " ".join(str(error).split())[:600].rstrip(". ") or type(error).__name__
        raise InputError(" ".join([f"{name}: {said}.", *([hint] if hint else [])])) from error


def _is_of_others(error: BaseException) -> bool:
    """Whether an error is no kind of ours or of the system's, and comes out of code of other libraries."""
    if type(error).__module__.startswith("lowtide") or getattr(error, "errno", None) is not None:
        return False
    passed = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith(_LIBRARIES) for name in passed)


def tell(message: str) -> None:
    """Say something to the person at the terminal; results go to stdout, so this goes to stderr."""
    typer.echo(message, err=True)


@contextmanager
def _sigterm_raises() -> Generator[None]:
    """Inside the block SIGTERM raises `Terminated`; only the main thread may decide that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _exit_code(error: Exception) -> int:
    is_input = isinstance(error, InputError | ValueError | FileNotFoundError | NoGuestsError)
    return BAD_INPUT if is_input else RUN_FAILED


def _message(error: Exception, *, has_budget: bool) -> str:
    if isinstance(error, InputError | NoGuestsError):
        return str(error)
    memory = _memory_that_ran_out(error)
    if memory is not None:
        budget = "" if has_budget else "--vram" if memory == "device" else "--ram"
        said = [_first_line(error) or "out of memory", _advice(budget)]
        return "\n".join([*said, *_way_on(error, f" {budget} auto" if budget else "")])
    if _is_mismatch(error):
        return _first_line(error)
    if isinstance(error, ValueError | OSError | Warning):
        return "\n".join([str(error) or type(error).__name__, *_way_on(error)])
    said = f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
    return "\n".join([said, _DEBUG_HINT, *_way_on(error)])


def _advice(budget: str) -> str:
    """What to try when memory ran out: the `budget` that was not given, or less within the one that was."""
    if budget:
        return f"Try a smaller --size, a budget such as {budget} 4GB, or --dtype bfloat16, half the memory of float32."
    return "Try a smaller --size, or let the plan change the result with --allow int8, fp8, int4 or blended_tiling."


def _way_on(error: BaseException, options: str = "") -> list[str]:
    """Where the latents are that were being decoded, if they were, and the command that goes on from them."""
    latents = getattr(error, "latents", None)
    if latents is None:
        return []
    command = f"lowtide decode {shlex.quote(str(latents))}{options}"
    return [f"The latents are kept in {latents} for a week. To go on from there: {command}"]


def _memory_that_ran_out(error: Exception) -> str | None:
    """The "device"'s or the "host"'s, where an error says that."""
    if "torch" not in sys.modules:
        return "host" if isinstance(error, MemoryError) else None
    from lowtide.machine.memory_errors import OutOfMemoryError, out_of

    return "host" if isinstance(error, OutOfMemoryError) else out_of(error)


def _is_mismatch(error: Exception) -> bool:
    """Whether weights are not the model's: what follows the first line lists hundreds of them."""
    if "torch" not in sys.modules:
        return False
    from lowtide.weights.fill import WeightsMismatchError

    return isinstance(error, WeightsMismatchError)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
