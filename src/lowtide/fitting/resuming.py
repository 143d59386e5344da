"""No work is lost when memory runs out: the step it ran out in is begun anew under a smaller plan."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from lowtide.fitting.subject import Subject
from lowtide.machine.accelerators import accelerator, devices_in_use
from lowtide.machine.memory_errors import OutOfMemoryError, out_of

if TYPE_CHECKING:
    from lowtide.fitting.applied_plan import AppliedPlan
    from lowtide.machine.device_kinds import Accelerator

S = TypeVar("S", bound=Subject)
P = ParamSpec("P")
R = TypeVar("R")
ADVICE = "Give the pipeline a budget, as in pipe.fit({name}='auto'): it then goes on with a smaller plan by itself."


def resumed(stage: str) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Have a method, a part of the stage called so, begun anew under a smaller plan when memory runs out in it.

    The scheduler and the generators are as they were before then, so that the result is the same. Without a budget the
    error goes on its way, with advice.
    """

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def begun_anew(subject: S, *args: P.args, **kwargs: P.kwargs) -> R:
            attempts = Attempts(subject, stage, (*args, *kwargs.values()))
            while True:
                with attempts:
                    return method(subject, *args, **kwargs)

        return begun_anew

    return decorate


class Attempts:
    """Attempts at something in a stage, in a loop: `while True: with attempts: return ...`; see `resumed`.

    Memory that runs out in one ends it without an error, and the next one begins under a smaller plan. `given` are
    values among which generators may be that it draws from.
    """

    def __init__(self, subject: Subject, stage: str, given: tuple[Any, ...]) -> None:
        self._subject, self._stage, self._given = subject, stage, given
        self._failed: Callable[[], None] | None = None

    def __enter__(self) -> None:
        if self._failed is not None:
            self._failed()  # only now: the error is gone, and with it the frames that held what was being made
            self._failed = None
        self._applied = self._subject.applied
        applied = self._applied
        self._state = None if applied is None else _State(self._subject, self._given, applied.fit.device)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        applied, state = self._applied, self._state
        device = None if applied is None else applied.fit.device
        memory = None if error is None else out_of(error, device)
        if error is None or memory is None:
            return False
        if applied is None or state is None:
            error.add_note(ADVICE.format(name="vram" if memory == "device" else "ram"))
            return False
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        of_host = memory == "host" and applied.fit.device.type != "cpu"
        self._failed = functools.partial(_go_on_smaller, applied, state, self._stage, reason, of_host=of_host)
        return True


def _go_on_smaller(applied: AppliedPlan, state: _State, stage: str, reason: str, *, of_host: bool) -> None:
    state.put_back()
    kind = accelerator(applied.fit.device)
    if kind is not None:  # other libraries get nothing of what PyTorch holds and does not use
        kind.give_back(applied.fit.device)
    if not applied.shrink(stage, reason, of_host=of_host):
        raise OutOfMemoryError(
            f"Memory ran out in {stage!r} under the smallest plan there is ({reason}). Close other programs, ask "
            "for less (size, pictures at once), or allow more, as in allow=('int8',)."
        )


class _State:
    """What a step changes besides its result: the scheduler's state, and that of generators."""

    def __init__(self, subject: Subject, given: tuple[Any, ...], device: torch.device | None = None) -> None:
        self._scheduler = subject.scheduler
        before = {} if self._scheduler is None else vars(self._scheduler)
        self._before = {name: copy.copy(value) if isinstance(value, list) else value for name, value in before.items()}
        values = [item for value in given for item in (value if isinstance(value, (list, tuple)) else (value,))]
        generators = [value for value in values if isinstance(value, torch.Generator)]
        # The CPU's own generator, and each device's, draw where none is given.
        self._generators = [(generator, generator.get_state()) for generator in (torch.default_generator, *generators)]
        self._on_devices = [(kind, used, kind.random_state(used)) for used, kind in _drawing(device)]

    def put_back(self) -> None:
        if self._scheduler is not None:
            now = vars(self._scheduler)
            now.update(self._before)  # and never empty: an interrupt, or a fork, may come in between
            for name in now.keys() - self._before.keys():
                now.pop(name, None)
        for generator, state in self._generators:
            generator.set_state(state)
        for kind, device, state in self._on_devices:
            kind.set_random_state(device, state)


def _drawing(device: torch.device | None) -> Iterator[tuple[torch.device, Accelerator]]:
    """The accelerators whose own generators a step may draw from: that which computes, and all that are in use.

    None of what is captured in a graph: nothing is drawn then, and CUDA refuses to say where the generator stands.
    """
    kind = None if device is None else accelerator(device)
    computing = [] if device is None or kind is None else [(device, kind)]
    for used, its_kind in dict([*computing, *devices_in_use()]).items():
        if not its_kind.is_capturing(used):
            yield used, its_kind
