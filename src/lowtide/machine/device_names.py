"""The names of devices, free of torch: kinds that PyTorch drives and that weights can be streamed to."""

from __future__ import annotations

import re

KINDS = ("cuda", "xpu", "mps")
"""Kinds of accelerators in the order in which one is chosen: NVIDIA and, through ROCm, AMD; Intel; Apple."""
DEVICE_NAMES = f"cpu, {', '.join(f'{kind}, {kind}:N' for kind in KINDS[:2])}, mps"
"""What a device may be called, for messages; N counts from 0."""


def is_device_name(name: str) -> bool:
    """Whether a device may be called so: "cpu", or a kind of accelerator with or without a number."""
    kind, colon, number = name.partition(":")
    if kind == "cpu":
        return not colon
    return kind in KINDS and (not colon or re.fullmatch(r"\d{1,3}", number, re.ASCII) is not None)
