"""The memory that kernels take beside their inputs and outputs: see `convolutions.py` for the ones that take most.

What is written here was read from the allocations of isolated operators (PyTorch 2.13 with oneDNN 3.12, one thread).
"""

from __future__ import annotations

from typing import Any

import torch

from lowtide.ops.meta_device import meant_device
from lowtide.prediction.convolutions import BOOKED, Convolution, nbytes, of_convolution, up
from lowtide.prediction.multiplier import Multiplier
from lowtide.prediction.operators import is_channels_last
from lowtide.prediction.scratchpads import scratch_of_product

POINTWISE = {"add", "sub", "mul", "div", "addcmul", "addcdiv", "where", "maximum", "minimum", "lerp", "pow"}
ENLARGEMENTS = {"upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"}
WITHOUT_GAPS = {"native_layer_norm", "_softmax", "_log_softmax"}
"""Kernels that copy what does not lie in order, such as keys whose heads are norms' batches."""
FEW_CHANNELS = 1
"""Up to which a map is enlarged as it lies."""
MATRIX_FIXED = 6 * 2**10
MATRIX_PART = 1152 * 2**10
"""Bytes of a weight that oneDNN arranges at once, at most."""
LONG_PART = 7 * 2**20
"""And where sums are long, of more than 1536 products."""
SMALL_PRODUCT = {2: 16**3, 3: 400}
"""Multiplications up to which PyTorch does a product in half precision itself, by the dimensions of the matrices."""


def workspace(func: Any, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """Bytes that an operator has allocated at its peak, beyond its inputs and outputs."""
    name = func.overloadpacket.__name__
    if name in ("convolution", "mkldnn_convolution"):
        return of_convolution(Convolution.of(name, args, given, made[0]))
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _of_flash_attention(given)
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return _of_product(given, made[0])
    if name in WITHOUT_GAPS:
        return 0 if given[0].is_contiguous() else nbytes(given[0])
    return _on_cpu(name, given, made[0]) if made and meant_device() == "cpu" else 0


def _on_cpu(name: str, given: list[torch.Tensor], made: torch.Tensor) -> int:
    if name in ENLARGEMENTS:
        return _of_enlargement(given[0], made)
    return _of_mixed_dtypes(given) if name.rstrip("_") in POINTWISE else 0


def _of_enlargement(x: torch.Tensor, out: torch.Tensor) -> int:
    """Kernels work with channels last, and bring source and result there and back."""
    return 0 if x.shape[1] <= FEW_CHANNELS or is_channels_last(x) else nbytes(x) + nbytes(out)


def _of_mixed_dtypes(given: list[torch.Tensor]) -> int:
    """On a CPU operands of another dtype than that of the sum are converted first."""
    tensors = [tensor for tensor in given if tensor.ndim > 0 and tensor.is_floating_point()]
    size = max((tensor.itemsize for tensor in tensors), default=0)
    return sum(tensor.numel() * size for tensor in tensors if tensor.itemsize < size)


def _of_flash_attention(given: list[torch.Tensor]) -> int:
    """Scores of some queries and keys for each thread, and in half precision keys and values arranged for products."""
    q, k = given[:2]
    batch, heads, queries, head = q.shape
    keys, size, threads = k.shape[2], q.itemsize, torch.get_num_threads()
    some_queries = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    some_keys = min(keys, 512)
    scores = threads * some_queries * (some_keys + 2 + head) * max(4, size)
    if size >= 4:
        return scores
    rounded = threads * some_queries * up(some_keys, 2) * size
    slices = -(-batch * heads * -(-queries // some_queries) // threads)
    if Multiplier.of(q.dtype) is not Multiplier.AMX or slices * some_queries < 4 * batch * heads:  # too few products
        return scores + rounded
    arranged = batch * heads * head * (keys + up(keys, 2)) * size
    return scores + rounded + arranged + threads * some_keys * head * size


def _of_product(given: list[torch.Tensor], made: torch.Tensor) -> int:
    """oneDNN's products in half precision: what it arranges of the matrices at a time."""
    if meant_device() not in ("cpu", None) or made.itemsize != 2:
        return 0
    first, second = given[-2:]
    rows, inner, columns = first.shape[-2], first.shape[-1], second.shape[-1]
    by = Multiplier.of(made.dtype)
    if by is not Multiplier.AMX:
        is_own = by is Multiplier.LOOPS or rows * inner * columns <= SMALL_PRODUCT[second.ndim]
        return 0 if is_own else _of_avx512(by, rows, inner, columns)
    if second.ndim == 3:
        return MATRIX_FIXED + 2 * up(inner, 64) * up(columns, 64)
    return _of_linear(rows, inner, columns) if second.stride(0) == 1 else scratch_of_product(rows, inner, columns)


def _of_avx512(by: Multiplier, rows: int, inner: int, columns: int) -> int:
    """The result in float32; with bfloat16 some of it at a time, and some of the second matrix, arranged."""
    if by is Multiplier.AVX512:
        return up(4 * rows * columns, BOOKED) + 2 * BOOKED
    deep = 512 if inner <= 1024 or rows == 1 else 1024
    some = 2**10 + 4 * min(rows, 256) * min(columns, 64) + 2 * 64 * min(up(inner, 32), deep)
    return torch.get_num_threads() * some


def _of_linear(rows: int, inner: int, columns: int) -> int:
    """`[rows, inner]` times a weight `[columns, inner]`: an upper estimate, measured from 1 to 4096 rows.

    The weight is arranged whole where it is used often or few numbers are summed up, else some columns at a time; a
    long first matrix, too.
    """
    inner = up(inner, 64 if inner > 32 else 32)
    some = 66 * inner + (128 * (rows + 1) if inner >= 512 else 0)
    some = max(some, 128 * inner) if rows == 1 or columns <= 64 else some
    whole = min(MATRIX_PART, 2 * inner * up(columns, 32))
    long = min(LONG_PART, 2 * rows * inner + (2**18 if inner > 2048 else 128)) if inner > 1536 and rows > 128 else 0
    is_whole = columns <= rows or rows >= 512 or inner <= 32
    return MATRIX_FIXED + max(whole if is_whole else 0, min(some, 2 * inner * up(columns, 32) + 2**13), long)
