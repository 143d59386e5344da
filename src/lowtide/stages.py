"""Named brackets around the stages of a pipeline, and the observers that watch them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Protocol


class StageObserver(Protocol):
    """Something that watches stages, such as a progress bar or the memory meter."""

    def stage_started(self, name: str, steps: int | None) -> None:
        """The stage `name` begins; it will take `steps` steps, or an unknown number."""
        ...

    def step_done(self, name: str, step: int) -> None:
        """Step number `step` of the stage, counted from 1, is done."""
        ...

    def stage_finished(self, name: str) -> None:
        """The stage has ended, normally or by an exception."""
        ...


class Stage:
    """One running stage: the code inside calls `advance` after each step."""

    def __init__(self, name: str, steps: int | None, observers: tuple[StageObserver, ...]) -> None:
        self.name = name
        self.steps = steps
        self.step = 0
        self._observers = observers

    def advance(self) -> None:
        """Count one step and tell the observers."""
        self.step += 1
        for observer in self._observers:
            observer.step_done(self.name, self.step)


class Stages:
    """The stage brackets of one pipeline. `observers` watch all of its calls, and may change between stages.

    A stage tells the observers that are present when it begins, and tells each of them when it ends, also after an
    exception. Stages may be nested. Observers added by `observed` watch only the calls of their own thread.
    """

    def __init__(self, observers: Iterable[StageObserver] = ()) -> None:
        self.observers: list[StageObserver] = list(observers)
        self._here = threading.local()

    @property
    def watching(self) -> tuple[StageObserver, ...]:
        """The observers of a stage that begins now in this thread."""
        return (*self.observers, *self._added)

    @property
    def _added(self) -> tuple[StageObserver, ...]:
        return getattr(self._here, "observers", ())

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Generator[Stage]:
        """Bracket one stage, for example `with stages.stage("denoise", steps=25) as stage: ... stage.advance()`."""
        observers = self.watching
        with ExitStack() as started:
            for observer in observers:
                observer.stage_started(name, steps)
                started.callback(observer.stage_finished, name)
            yield Stage(name, steps, observers)

    @contextmanager
    def observed(self, *observers: StageObserver) -> Generator[None]:
        """Add `observers` for the length of a `with` block, in this thread."""
        before = self._added
        try:
            self._here.observers = (*before, *observers)
            yield
        finally:
            self._here.observers = before
