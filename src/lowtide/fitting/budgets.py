"""Budgets as people give them: bytes, "6GB", "80%" of what there is, "auto", or "-1GB" for what is free less 1 GB."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from typing import TYPE_CHECKING

from lowtide.machine.host import host_memory
from lowtide.measuring.peaks import resident_memory
from lowtide.planning.plan import Budgets
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
    if not isinstance(text, str):
        return _size(text, asked, name)
    if text.lower() == "auto":
        return int(free * AUTO_SHARE)
    if share := _PERCENT.fullmatch(text):
        if float(share[1]) > 100:
            raise ValueError(f"{name}={asked!r} is not possible: a share is at most 100 %.")
        return int(total * float(share[1]) / 100)
    if not text.startswith("-"):
        return _size(text, asked, name)
    spared = _size(text[1:], asked, name)
    if spared >= free:
        raise ValueError(f"{name}={asked!r} is not possible: only {format_decimal(free)} is free.")
    return free - spared


def _size(text: int | str, asked: int | str, name: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(
            f"{name}={asked!r} is not possible: give bytes or a size such as '4GB', a share such as '80%', 'auto', or "
            "'-1GB' for what is free less 1 GB."
        ) from error


def check_budget(asked: Asked, name: str) -> None:
    """Raise `ValueError` now for a budget that no machine can have."""
    budget_bytes(asked, name, total=2**62, free=2**62)


def parse_budgets(device: torch.device, vram: Asked = None, ram: Asked = None, disk: Asked = None) -> Budgets:
    """Budgets in bytes on this machine; what is not given is what is free, but for a little.

    On a CPU `vram` has no effect, and a warning says so. On a device whose memory is the host's, both are one budget:
    the smaller of those given. Of a GPU that is not here, it must be a size, or None for no limit. Raises `ValueError`
    for what means nothing.
    """
    for name, asked in (("vram", vram), ("ram", ram), ("disk", disk)):
        check_budget(asked, name)
    if device.type == "cpu" and vram is not None:
        warnings.warn(f"vram={vram!r} has no effect: there is no GPU here, and all memory is ram.", stacklevel=3)
    host, own = host_memory(), resident_memory()
    free = min(host.available + own, host.total)  # pages of libraries may count for another container
    on_disk = shutil.disk_usage(tempfile.gettempdir())
    on_host = budget_bytes("auto" if ram is None else ram, "ram", total=host.total, free=free)
    on_device = None if device.type == "cpu" else _vram(device, vram)
    if _is_unified(device):
        on_host = min(size for size in (on_host, on_device) if size is not None)
        on_device = None
    temporary = budget_bytes("auto" if disk is None else disk, "disk", total=on_disk.total, free=on_disk.free)
    return Budgets(on_device, on_host, temporary)


def _is_unified(device: torch.device) -> bool:
    from lowtide.machine.accelerators import accelerator, is_here

    kind = accelerator(device)
    return kind is not None and is_here(device) and kind.shares_host_memory(device)


def _vram(device: torch.device, asked: Asked) -> int | None:
    from lowtide.machine.accelerators import accelerator, is_here

    kind = accelerator(device)
    if kind is not None and is_here(device):
        memory = kind.memory(device)
        return budget_bytes("auto" if asked is None else asked, "vram", total=memory.total, free=memory.free)
    try:
        return None if asked is None else parse_bytes(asked)
    except ValueError as error:
        raise ValueError(f"vram={asked!r} is not possible without that GPU: give a size such as '6GB'.") from error
