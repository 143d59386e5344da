"""Replace methods of one module instance and put them back. Copies of the module do not have the replacements."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_OVERRIDES = "_lowtide_overrides"  # on every method that is set


def is_override(value: object) -> bool:
    """Whether an entry of a module is a method of ours that stands in for its own."""
    return _OVERRIDES in getattr(value, "__dict__", {})


class Overrides:
    """A set of overrides that are undone together; `marks` are entries of modules that go with them.

    The last of the marks is set first and goes last: who finds it, in a forked child or after an interrupt, can undo
    all that is there.
    """

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._before: dict[tuple[nn.Module, str], Any] = {}
        """What each entry was before; None where there was none."""
        self._own: set[tuple[nn.Module, str]] = set()
        """The entries that were not taken over only."""

    def take_over(self, other: Overrides) -> None:
        """Undo those of `other` too. Each is there until it is set anew here, or until `undo_others`."""
        self._before = {**other._before, **self._before}

    def set(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Let `module.name` be `method` from now on."""
        method.__dict__[_OVERRIDES] = self
        self._enter(module, name, method)

    def mark(self, module: nn.Module, name: str, owner: object) -> None:
        """Let `module` have a mark from now on."""
        self._enter(module, name, owner)

    def _enter(self, module: nn.Module, name: str, entry: Any) -> None:
        self._before.setdefault((module, name), module.__dict__.get(name))
        self._own.add((module, name))
        module.__dict__[name] = entry  # one instruction: another thread finds this one or the one before

    def plain(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """The method as it is without these overrides."""
        if (module, name) not in self._before:
            return getattr(module, name)
        before = self._before[module, name]
        return inspect.getattr_static(type(module), name).__get__(module) if before is None else before

    def now(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """What to call in place of one of these that has ended: what has replaced it, or the method without it.

        It is still there in the middle of a change, and where an interrupt or a fork cut one short.
        """
        is_there = getattr(module.__dict__.get(name), _OVERRIDES, None) is self
        return self.plain(module, name) if is_there else getattr(module, name)

    def set_state(self, module: nn.Module) -> None:
        """Have copies and pickles of `module` made without the overrides."""
        plain = self.plain(module, "__getstate__")

        def plain_state() -> dict[str, Any]:
            state: dict[str, Any] = dict(plain())  # some classes leave out what cannot be copied
            for name in list(state):
                entry = (module, name)
                if name in self._marks or (entry in self._before and self._before[entry] is None):
                    del state[name]
                elif entry in self._before:
                    state[name] = self._before[entry]
            return state

        self.set(module, "__getstate__", plain_state)

    def undo_others(self) -> None:
        """Undo those that were taken over and not set anew."""
        for module, name in [entry for entry in self._before if entry not in self._own]:
            self._undo(module, name)
            del self._before[module, name]

    def put_back(self) -> None:
        """Undo all of them."""
        for module, name in reversed(self._before):
            if name not in self._marks:
                self._undo(module, name)
        for mark in self._marks:
            for module, _ in self._before:
                module.__dict__.pop(mark, None)
        self._before, self._own = {}, set()

    def _undo(self, module: nn.Module, name: str) -> None:
        before = self._before[module, name]
        if before is not None:
            module.__dict__[name] = before
        else:
            module.__dict__.pop(name, None)
