"""The machine that a table was measured on."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from lowtide.machine.host import host_memory, processor_name_and_flags, usable_cpus


@dataclass(frozen=True)
class Machine:
    """Its processor and how many we may use, bytes of memory (a container's limit, if there is one), the system."""

    processor: str
    processors: float
    memory: int
    system: str


def this_machine() -> Machine:
    """Look at this machine."""
    name, _ = processor_name_and_flags()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(name, usable_cpus(), host_memory().total, system)
