"""The engine: weights rest, come to work, and leave.

The public names are imported on first use. `Casting`, `Meter`, `StageReading` and `steady_malloc` have moved to
`casting/`, `measuring/` and `machine/`; older scripts still find them here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.casting.casting import Casting
    from lowtide.machine.heap import steady_malloc
    from lowtide.measuring.meter import Meter, StageReading
    from lowtide.memory.attach import Attachment, detach
    from lowtide.memory.ledger import Ledger
    from lowtide.memory.presets import apply_residency
    from lowtide.memory.rule import Level, Rule, Tier
    from lowtide.memory.rule_changes import attachment_of

__all__ = [
    "Attachment",
    "Casting",
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
    **dict.fromkeys(("Attachment", "detach"), "lowtide.memory.attach"),
    **dict.fromkeys(("Level", "Rule", "Tier"), "lowtide.memory.rule"),
    **dict.fromkeys(("Meter", "StageReading"), "lowtide.measuring.meter"),
    "Casting": "lowtide.casting.casting",
    "Ledger": "lowtide.memory.ledger",
    "apply_residency": "lowtide.memory.presets",
    "attachment_of": "lowtide.memory.rule_changes",
    "steady_malloc": "lowtide.machine.heap",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
