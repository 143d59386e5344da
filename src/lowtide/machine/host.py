"""How much memory and how many processors this process may use, limits of containers (Linux cgroups) included."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class HostMemory:
    """Bytes of memory in all and still available; `limited` where a cgroup allows less than the machine has."""

    total: int
    available: int
    limited: bool


def host_memory() -> HostMemory:
    """The memory of this machine, or what the tightest cgroup around this process leaves of it."""
    machine = psutil.virtual_memory()
    total, available, limited = machine.total, machine.available, False
    for limit, used in _cgroup_limits():
        if limit < machine.total:
            limited = True
            total, available = min(total, limit), min(available, max(limit - used, 0))
    return HostMemory(total, available, limited)


def usable_cpus() -> float:
    """The processors this process may use: its affinity mask, or less where a cgroup (version 2) grants less time."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroups():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            count = min(count, int(quota) / int(period))
    return count


def processor_name_and_flags() -> tuple[str, frozenset[str]]:
    """From Linux's `/proc/cpuinfo`; elsewhere the name that Python knows, and no flags."""
    text = _CPU_INFO.read_text(encoding="utf-8", errors="replace") if _CPU_INFO.is_file() else ""
    entries = dict(_entry(line) for line in reversed(text.splitlines()) if ":" in line)
    name = entries.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(entries.get("flags", entries.get("Features", "")).split())


def _entry(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each cgroup with a limit; file pages that can be dropped do not count as used."""
    for folder in _cgroups():
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            yield int(limit), int(used) - _droppable(folder)


def _droppable(folder: Path) -> int:
    counters = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(counters.get("total_inactive_file", counters.get("inactive_file", 0)))


def _cgroups() -> Iterator[Path]:
    """The folders of this process's cgroups, from its own up to the root (version 2, or 1's memory hierarchy)."""
    for line in _read(_OWN_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = _CGROUP_ROOT / controllers
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _read(path: Path) -> str:
    """The file's text; nothing where it is missing, as it is outside Linux or for a controller that is off."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
