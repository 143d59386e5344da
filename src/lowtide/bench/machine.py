"""The machine that a table was measured on."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from lowtide.machine.host import host_memory, processor_name_and_flags, usable_cpus


@dataclass(frozen=True)
class Machine:
    """A machine: its processor, how many we may use, bytes of memory (or of a container's limit), its system."""

    processor: str
    processors: float
    memory: int
    system: str


def this_machine() -> Machine:
    """Describe this machine."""
    name, _ = processor_name_and_flags()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(name, usable_cpus(), host_memory().total, system)
