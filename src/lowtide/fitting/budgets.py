"""Budgets as people give them: bytes, "6GB", "80%" of what there is, "auto", or "-1GB" for what is free less 1 GB."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.machine.host import host_memory
from lowtide.measuring.peaks import resident_memory
from lowtide.planning.plan import Budgets, check_allowed
from lowtide.sizes import format_decimal, parse_bytes

if TYPE_CHECKING:
    import torch

AUTO_SHARE = 0.9
"""Of what is free: what "auto" takes."""
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", re.ASCII)
Asked = int | str | None
"""A budget as it is given: bytes, text, or None for no limit."""


def budget_bytes(asked: Asked, name: str, *, total: int, free: int) -> int | None:
    """The bytes meant by a budget called `name`, of `total` bytes there are and `free` ones; None for no limit.

    Raises `ValueError` for text that means nothing, shares over 100 %, and more to be left than is free.
    """
    if asked is None:
        return None
    text = asked.strip() if isinstance(asked, str) else asked
    if isinstance(text, str) and text.lower() == "auto":
        return int(free * AUTO_SHARE)
    if isinstance(text, str) and (share := _PERCENT.fullmatch(text)):
        if float(share[1]) > 100:
            raise ValueError(f"{name}={asked!r} is not possible: a share is at most 100 %.")
        return int(total * float(share[1]) / 100)
    try:
        if isinstance(text, str) and text.startswith("-"):
            return _left(parse_bytes(text[1:]), asked, name, free)
        return parse_bytes(text)
    except ValueError as error:
        if "is free" in str(error):
            raise
        raise ValueError(
            f"{name}={asked!r} is not possible: give bytes or a size such as '4GB', a share such as '80%', 'auto', or "
            "'-1GB' for what is free less 1 GB."
        ) from error


def check_budget(asked: Asked, name: str) -> None:
    """Raise `ValueError` now for a budget that no machine can have."""
    budget_bytes(asked, name, total=2**62, free=2**62)


def _left(spared: int, asked: int | str, name: str, free: int) -> int:
    if spared >= free:
        raise ValueError(f"{name}={asked!r} is not possible: only {format_decimal(free)} is free.")
    return free - spared


@dataclass(frozen=True)
class AskedBudgets:
    """Budgets as they were given, and what may change the result; see `lowtide.fit`."""

    vram: Asked = None
    ram: Asked = None
    disk: Asked = None
    allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, vram: Asked, ram: Asked, disk: Asked, allow: Collection[str]) -> AskedBudgets:
        """What was given, checked; raises `ValueError` for what means nothing."""
        for name, asked in (("vram", vram), ("ram", ram), ("disk", disk)):
            check_budget(asked, name)
        check_allowed(allow)
        return cls(vram, ram, disk, tuple(allow))

    @property
    def are_given(self) -> bool:
        """Whether there is any."""
        return any(one is not None for one in (self.vram, self.ram, self.disk))


def resolved(device: torch.device, asked: AskedBudgets) -> Budgets:
    """Budgets in bytes on this machine; what is not given is what is free, but for a little."""
    host, own = host_memory(), resident_memory()
    free = min(host.available + own, host.total)  # pages of libraries may count for another container
    on_disk = shutil.disk_usage(tempfile.gettempdir())
    return Budgets(
        None if device.type == "cpu" else _vram(device, asked.vram),
        budget_bytes("auto" if asked.ram is None else asked.ram, "ram", total=host.total, free=free),
        budget_bytes("auto" if asked.disk is None else asked.disk, "disk", total=on_disk.total, free=on_disk.free),
    )


def _vram(device: torch.device, asked: Asked) -> int | None:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return budget_bytes("auto" if asked is None else asked, "vram", total=total, free=free + own)


def warn_without_gpu(device: torch.device, vram: Asked) -> None:
    """Say that a budget of a GPU's memory has no effect where there is none."""
    if device.type == "cpu" and vram is not None:
        warnings.warn(f"vram={vram!r} has no effect: there is no GPU here, and all memory is ram.", stacklevel=4)
