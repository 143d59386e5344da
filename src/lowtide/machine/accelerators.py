"""Accelerators: which devices beside the CPU there are here, and of which kind each of them is.

Everything else in the library asks the kind for what it needs, so that no call goes to "the current device" by
accident. `accelerator(device)` is None for a CPU.
"""

from __future__ import annotations

from typing import Any

import torch

from lowtide.machine.device_kinds import Accelerator, Cuda, Mps, Xpu
from lowtide.machine.device_names import KINDS

_KINDS = {kind: {"cuda": Cuda, "xpu": Xpu, "mps": Mps}.get(kind, Accelerator)(kind) for kind in KINDS}


def accelerator(device: torch.device | str) -> Accelerator | None:
    """The accelerator that a device is; None for a CPU. Raises `ValueError` for kinds that are not supported."""
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    if kind not in _KINDS:
        raise ValueError(f"device={str(device)!r} is not possible: weights can be streamed to {_possible()}.")
    return _KINDS[kind]


def computing_stream(device: torch.device) -> Any:
    """The stream of this thread on a device, in the order of which its memory is used; None where there is one order.

    That is so on a CPU, on meta, and on kinds without streams.
    """
    kind = _KINDS.get(device.type)
    return kind.computing(device) if kind is not None and kind.has_streams else None


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread asks a device for is recorded in a graph, and not done."""
    kind = _KINDS.get(device.type)
    return kind is not None and kind.is_capturing(device)


def brought_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on a device; the host does not wait until the device comes to the copy, where it need not."""
    kind = _KINDS.get(device.type)
    may_go_on = kind is not None and kind.reads_at_once and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.to(device, non_blocking=may_go_on)


def is_here(device: torch.device) -> bool:
    """Whether this very device can be used here; a CPU can."""
    kind = accelerator(device)
    return kind is None or (device.index or 0) < kind.count()


def best_device() -> torch.device:
    """The first accelerator that is here; the CPU where there is none."""
    kind = next((kind for kind in _KINDS.values() if kind.count()), None)
    return torch.device("cpu") if kind is None else torch.device(kind.kind, 0)


def devices_here() -> list[torch.device]:
    """All accelerators that are here."""
    return [torch.device(kind.kind, index) for kind in _KINDS.values() for index in range(kind.count())]


def devices_in_use() -> list[tuple[torch.device, Accelerator]]:
    """Those of which this process holds memory, each with its kind; nothing is begun by asking."""
    here = [(device, _KINDS[device.type]) for device in devices_here()]
    return [(device, kind) for device, kind in here if kind.is_in_use(device)]


def obstacle(device: torch.device) -> str:
    """Why a device that is not here cannot be used, as part of a sentence."""
    kind = accelerator(device)
    assert kind is not None
    count, upper = kind.count(), kind.kind.upper()
    seen = f"{count or 'no'} {upper} device{'' if count == 1 else 's'}"
    others = ", ".join(str(other) for other in devices_here())
    return f"PyTorch sees {seen} here" + (f", but {others}" if others and not count else "")


def _possible() -> str:
    return ", ".join(f"'{kind}'" for kind in ("cpu", *_KINDS))
