"""Weights in memory: the engine that brings them to work and lets them rest, and the meter of what that takes.

The names are imported on first use, so that the meter does not bring in torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.memory.attach import Attachment, attachment_of, detach
    from lowtide.memory.forms import Casting, Form, Level, Rule, Tier
    from lowtide.memory.ledger import Ledger
    from lowtide.memory.meter import Meter, StageReading, steady_malloc
    from lowtide.memory.presets import apply_residency

__all__ = [
    "Attachment",
    "Casting",
    "Form",
    "Ledger",
    "Level",
    "Meter",
    "Rule",
    "StageReading",
    "Tier",
    "apply_residency",
    "attachment_of",
    "detach",
    "steady_malloc",
]

_HOME = {
    **dict.fromkeys(("Attachment", "attachment_of", "detach"), "attach"),
    **dict.fromkeys(("Casting", "Form", "Level", "Rule", "Tier"), "forms"),
    **dict.fromkeys(("Meter", "StageReading", "steady_malloc"), "meter"),
    "Ledger": "ledger",
    "apply_residency": "presets",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
