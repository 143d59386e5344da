"""Brackets around the calls of a guest's networks while its own call runs: they are the stages of the run."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from lowtide.fitting.resuming import Attempts
from lowtide.fitting.subject import Subject
from lowtide.guests.driven_guest import stage_name
from lowtide.memory.attach import ENTRY_POINTS
from lowtide.memory.overrides import Overrides
from lowtide.prediction.driving import FORWARD
from lowtide.stages import Stage

_Inner = tuple[str, str]


class Brackets:
    """While they are on, a call of a network is a step of its stage, and begun anew when memory runs out in it.

    A stage begins with the first call of a network, or of another entry of it, and ends when another one begins. Calls
    that another thread makes of the networks are none of the run's.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._overrides = Overrides()
        self._inner: dict[_Inner, Callable[..., Any]] = {}
        self._stage: Stage | None = None
        self._open: AbstractContextManager[Stage] | None = None
        self._is_inside = False
        self._thread = threading.get_ident()

    @contextmanager
    def on(self) -> Generator[None]:
        """Put them on for one call of the pipeline."""
        try:
            self._put_on(self._subject.modules())
            yield
        finally:
            try:
                self._put_off()
            finally:
                try:
                    self._end_stage()
                finally:
                    self._put_off()  # again: an interrupt may have come before it, or into it

    def _put_on(self, networks: Mapping[str, nn.Module]) -> None:
        for name, network in networks.items():
            self._set(network, (name, FORWARD), "_call_impl")
            for entry in ENTRY_POINTS:
                method = getattr(network, entry, None)
                if callable(method) and not isinstance(method, nn.Module):
                    self._set(network, (name, entry), entry)
            for module in network.modules():
                self._set_around_changes(module)

    def _set_around_changes(self, module: nn.Module) -> None:
        """Have the brackets off while the run converts a module, as by `.to(dtype)`: its rule is made anew then."""
        inner = module._apply

        @functools.wraps(inner)
        def applied(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return inner(*args, **kwargs)
            self._put_off()
            try:
                return module._apply(*args, **kwargs)
            finally:
                self._put_on(self._subject.modules())

        self._overrides.set(module, "_apply", applied)

    def _set(self, network: nn.Module, key: _Inner, attribute: str) -> None:
        inner = getattr(network, attribute)
        self._inner[key] = inner

        @functools.wraps(inner)
        def bracketed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside or threading.get_ident() != self._thread:
                return inner(*args, **kwargs)
            return self._called(key, args, kwargs)

        self._overrides.set(network, attribute, bracketed)

    def _put_off(self) -> None:
        self._overrides.put_back()
        self._inner = {}

    def _called(self, key: _Inner, args: Any, kwargs: Any) -> Any:
        name = stage_name(*key)
        stage = self._in_stage(name)
        attempts = Attempts(self._subject, name, (*args, *kwargs.values()))
        while True:
            with attempts:
                result = self._tried(key, args, kwargs)
                stage.advance()
                return result

    def _tried(self, key: _Inner, args: Any, kwargs: Any) -> Any:
        """One try. Where it fails the brackets are off, so that rules may change; the next one puts them on again."""
        if not self._inner:
            self._put_on(self._subject.modules())
        self._is_inside = True
        try:
            return self._inner[key](*args, **kwargs)
        except BaseException:
            self._put_off()
            raise
        finally:
            self._is_inside = False

    def _in_stage(self, name: str) -> Stage:
        if self._stage is None or self._stage.name != name:
            self._end_stage()
            opened = self._subject.stages.stage(name)
            self._stage = opened.__enter__()
            self._open = opened  # not before: what an interrupt keeps from beginning cannot end
        return self._stage

    def _end_stage(self) -> None:
        opened, self._open, self._stage = self._open, None, None
        if opened is not None:
            opened.__exit__(None, None, None)
