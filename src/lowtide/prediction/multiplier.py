"""What multiplies numbers in half precision on a CPU: the memory that kernels take depends on it."""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch


class Multiplier(Enum):
    """What multiplies numbers in half precision: a Xeon's AMX, AVX-512 with bfloat16 (measured on an AMD EPYC), AVX-512
    alone (measured there, oneDNN kept from bfloat16), or PyTorch's own loops, where oneDNN does not take the dtype.
    """

    AMX = 1
    BFLOAT16 = 2
    AVX512 = 3
    LOOPS = 4

    @classmethod
    @cache
    def of(cls, dtype: torch.dtype) -> Multiplier:
        """The one for a dtype on this machine's CPU."""
        ops = torch.ops.mkldnn
        knows = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
        if dtype not in knows or not knows[dtype]():
            return cls.LOOPS
        if torch.cpu._is_amx_tile_supported():
            return cls.AMX
        return cls.BFLOAT16 if torch.cpu._is_avx512_bf16_supported() else cls.AVX512
