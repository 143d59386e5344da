"""Which instructions a processor has that fast kernels are made of, by the names that people know."""

from __future__ import annotations

KERNELS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX512_BF16": ("avx512_bf16",),
    "AVX512_FP16": ("avx512_fp16",),
    "AMX": ("amx_tile",),
    "NEON": ("asimd", "neon"),
    "Arm bf16": ("bf16", "svebf16"),
}
"""By name, the flags of `/proc/cpuinfo` of which any will do."""
_OF_ARM = ("NEON", "Arm bf16")


def kernels(flags: frozenset[str]) -> dict[str, bool]:
    """Of each kind of instructions of a processor with these flags, whether it has them; nothing without any flag.

    Those of Arm's processors are left out where these are not.
    """
    has = {name: any(flag in flags for flag in any_of) for name, any_of in KERNELS.items()}
    is_arm = any(has[name] for name in _OF_ARM)
    return {name: there for name, there in has.items() if (name in _OF_ARM) == is_arm} if flags else {}
