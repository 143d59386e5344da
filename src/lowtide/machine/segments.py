"""How PyTorch's caching allocator asks an accelerator for memory: in segments.

The constants are those of `c10/core/AllocatorConfig.h` in PyTorch 2.13.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MIB = 2**20
LARGE = 10 * MIB
"""Memory of this size or more gets a segment of its own."""
ROUND_LARGE = 2 * MIB
"""What the size of such a segment is a multiple of."""
KINDS = ("cuda", "xpu")
"""Kinds of devices whose allocator goes by these rules."""
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def has_expandable_segments(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process asks for them."""
    settings = (environment[name] for name in SETTINGS if name in environment)
    return any(re.search(r"expandable_segments\s*:\s*true", setting, re.IGNORECASE) for setting in settings)


def own_segment(nbytes: int) -> int:
    """Bytes of the segment that memory of at least `LARGE` bytes gets."""
    return -(-nbytes // ROUND_LARGE) * ROUND_LARGE


def rounding(nbytes: int, kind: str) -> int:
    """Bytes that such a segment has beside the memory, on a kind of device; other memory shares its segment."""
    has_its_own = kind in KINDS and nbytes >= LARGE and not has_expandable_segments()
    return own_segment(nbytes) - nbytes if has_its_own else 0
