"""Replace methods of one module instance and put them back. Copies of the module do not have the replacements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Overrides:
    """A set of overrides that are undone together; `marks` are entries of modules that go with them.

    The last of the marks is set first and goes last: who finds it, in a forked child or after an interrupt, can undo
    all that is there.
    """

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._before: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Let `module.name` be `method` from now on."""
        self._before.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = method

    def mark(self, module: nn.Module, name: str, owner: object) -> None:
        """Let `module` have a mark from now on."""
        self._before.append((module, name, None))
        module.__dict__[name] = owner

    def set_state(self, module: nn.Module) -> None:
        """Have copies and pickles of `module` made without the overrides."""
        plain = module.__getstate__

        def plain_state() -> dict[str, Any]:
            state: dict[str, Any] = dict(plain())  # some classes leave out what cannot be copied
            for owner, name, before in reversed(self._before):
                if owner is module and before is None:
                    state.pop(name, None)
                elif owner is module and name in state:
                    state[name] = before
            return {name: value for name, value in state.items() if name not in self._marks}

        self.set(module, "__getstate__", plain_state)

    def put_back(self) -> None:
        """Undo all of them."""
        for module, name, before in reversed(self._before):
            if before is not None:
                module.__dict__[name] = before
            elif name not in self._marks:
                module.__dict__.pop(name, None)
        for mark in self._marks:
            for module, _, _ in self._before:
                module.__dict__.pop(mark, None)
        self._before = []
