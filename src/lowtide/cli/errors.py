"""How a command ends when something is wrong: a short message on stderr and an exit code, no traceback.

Exit codes: 1 the run failed, 2 the input cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import typer

RUN_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_DEBUG_HINT = "Run again with LOWTIDE_DEBUG=1 to see where this comes from."


class InputError(Exception):
    """What the user asked for cannot be done: the message says what is possible and what to try."""


@contextmanager
def reported(*, debug: bool) -> Generator[None]:
    """End the command with a message and an exit code when the block raises; with `debug`, let the error through."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise _ended(INTERRUPTED, "Stopped. No half-written file is left behind.") from None
    except Exception as error:
        if debug:
            raise
        raise _ended(_exit_code(error), _message(error)) from None


def tell(message: str) -> None:
    """Say something to the person at the terminal; results go to stdout, so this goes to stderr."""
    typer.echo(message, err=True)


def _ended(code: int, message: str) -> typer.Exit:
    tell(message if code == INTERRUPTED else f"Error: {message}")
    return typer.Exit(code)


def _exit_code(error: Exception) -> int:
    return BAD_INPUT if isinstance(error, InputError | ValueError | FileNotFoundError) else RUN_FAILED


def _message(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    if _is_out_of_memory(error):
        said = _first_line(error) or "out of memory"
        advice = "Try a smaller --size, a budget such as --ram 4GB, or --dtype bfloat16, half the memory of float32."
        return f"{said}\n{advice}"
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {_first_line(error)}".rstrip(": ") + f"\n{_DEBUG_HINT}"


def _is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
