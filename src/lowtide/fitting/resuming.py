"""No work is lost when memory runs out: steps are begun anew under a smaller plan, and latents are kept in a file."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from lowtide.fitting.out_of_memory import OutOfMemoryError, is_of_device, is_out_of_memory

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
