"""Named brackets around the stages of a pipeline, and the observers that watch them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Protocol


class StageObserver(Protocol):
    """Something that watches stages, such as a progress bar or the memory meter.

    Where an interrupt such as Ctrl-C comes into `stage_started`, `stage_finished` is called all the same.
    """

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


class _Watch:
    """Observers that are added for a while: an interrupt in the end of it leaves none, since its frame keeps them."""

    def __init__(self, observers: tuple[StageObserver, ...]) -> None:
        self.observers = observers


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
        return tuple(observer for watch in self._watches for observer in watch.observers)

    @property
    def _watches(self) -> list[_Watch]:
        kept = (reference() for reference in getattr(self._here, "watches", ()))
        return [watch for watch in kept if watch is not None]

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Generator[Stage]:
        """Bracket one stage, for example `with stages.stage("denoise", steps=25) as stage: ... stage.advance()`."""
        observers, told = self.watching, list[StageObserver]()
        try:
            for observer in observers:
                _tell_start(observer, name, steps, told)
            yield Stage(name, steps, observers)
        finally:
            _tell_end(name, told)

    @contextmanager
    def observed(self, *observers: StageObserver) -> Generator[None]:
        """Add `observers` for the length of a `with` block, in this thread."""
        before, this = self._watches, _Watch(observers)
        try:
            self._here.watches = [weakref.ref(watch) for watch in (*before, this)]
            yield
        finally:
            self._here.watches = [weakref.ref(watch) for watch in before]


def _tell_start(observer: StageObserver, name: str, steps: int | None, told: list[StageObserver]) -> None:
    try:
        told.append(observer)  # before it begins: an interrupt may come at any moment
        observer.stage_started(name, steps)
    except Exception:
        told.pop()  # it has failed to start, so there is nothing to end
        raise


def _tell_end(name: str, told: list[StageObserver]) -> None:
    """Tell all of them, the last first, though one breaks."""
    if told:
        try:
            told.pop().stage_finished(name)
        finally:
            _tell_end(name, told)
