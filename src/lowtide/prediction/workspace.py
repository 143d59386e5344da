"""The memory that kernels take beside their inputs and outputs.

oneDNN's convolutions bring source, weight and result in an order of their own, and have a scratchpad. What is written
here was read from the allocations of isolated operators (PyTorch 2.13 with oneDNN 3.12, one thread): kernels 1 and 3,
strides 1 and 2, in two and three dimensions, 3 to 2560 channels. In half precision it depends on what multiplies; see
`Multiplier`. Without AVX-512 blocks of channels are smaller (8 instead of 16), so what is padded here is an upper
estimate there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch

from lowtide.ops.meta_device import meant_device
from lowtide.prediction.operators import is_channels_last
from lowtide.prediction.scratchpads import pages_of_scratch, scratch_of_product

BLOCK = 16
"""Channels that oneDNN computes side by side: both kinds are filled up to multiples."""
ENTRIES_OF_NATIVE = 20480
"""Up to which one map in float32 is convolved by PyTorch itself, by writing every entry down for each of the kernel's.
"""
POINTWISE = {"add", "sub", "mul", "div", "addcmul", "addcdiv", "where", "maximum", "minimum", "lerp", "pow"}
ENLARGEMENTS = {"upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"}
FEW_CHANNELS = 1
"""Up to which a map is enlarged as it lies."""
MATRIX_FIXED = 6 * 2**10
MATRIX_PART = 1152 * 2**10
"""Bytes of a weight that oneDNN arranges at once, at most."""
LONG_PART = 7 * 2**20
"""And where sums are long, of more than 1536 products."""
PAGE = 4096
BOOKED = 128
"""Bytes that oneDNN adds to each part of a scratchpad."""
SMALL_PRODUCT = {2: 16**3, 3: 400}
"""Multiplications up to which PyTorch does a product in half precision itself, by the dimensions of the matrices."""


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


def workspace(func: Any, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> int:
    """Bytes that an operator has allocated at its peak, beyond its inputs and outputs."""
    name = func.overloadpacket.__name__
    if name in ("convolution", "mkldnn_convolution"):
        return _of_convolution(Convolution.of(name, args, given, made[0]))
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _of_flash_attention(given)
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return _of_product(given, made[0])
    if name in ENLARGEMENTS and meant_device() == "cpu":
        return _of_enlargement(given[0], made[0])
    if name.rstrip("_") in POINTWISE and meant_device() == "cpu":
        return _of_mixed_dtypes(given)
    return 0


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution; sizes are those of the kernel and of the maps, without batch and channels."""

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    has_bias: bool
    is_padded: bool
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    always_onednn: bool

    @classmethod
    def of(cls, name: str, args: Any, given: list[torch.Tensor], out: torch.Tensor) -> Convolution:
        """From the arguments of `aten::convolution`, or of `aten::mkldnn_convolution`."""
        is_own = name == "mkldnn_convolution"
        strides, dilations = (args[4], args[5]) if is_own else (args[3], args[5])
        dims, groups = out.ndim - 2, args[6] if is_own else args[8]
        strides, dilations = (tuple(setting) * (dims if len(setting) == 1 else 1) for setting in (strides, dilations))
        is_padded = any(args[3 if is_own else 4])
        return cls(given[0], given[1], out, args[2] is not None, is_padded, strides, dilations, groups, is_own)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel has one entry."""
        return math.prod(self.sizes) == 1

    @property
    def is_strided(self) -> bool:
        """Whether entries are left out."""
        return any(stride > 1 for stride in self.strides)

    @property
    def is_channels_last(self) -> bool:
        """Whether the kernel takes its maps with channels last."""
        return any(is_channels_last(tensor) for tensor in (self.x, self.weight))

    @property
    def by(self) -> Multiplier:
        """What multiplies, in half precision."""
        return Multiplier.of(self.x.dtype)

    @property
    def is_native(self) -> bool:
        """Whether PyTorch convolves itself, not oneDNN."""
        if self.always_onednn:
            return False
        if self.x.dtype != torch.float32:
            return self.by is Multiplier.LOOPS
        is_odd = self.is_strided or any(dilation > 1 for dilation in self.dilations)
        may = is_odd or len(self.x) >= 16 or not self.is_pointwise or torch.get_num_threads() > 1
        is_large = self.groups > 1 or min(self.sizes[-2:]) > 3 or len(self.x) > 1
        return not (may and (is_large or self.x.shape[:4].numel() > ENTRIES_OF_NATIVE))


def _of_convolution(conv: Convolution) -> int:
    if meant_device() not in ("cpu", None):
        # cuDNN's largest workspace is about the maps and the weight once more (against published figures: -0.01 to
        # -0.26 % of whole runs, and -15 to -18 % without).
        return sum(map(_nbytes, (conv.x, conv.weight, conv.out)))
    if conv.groups > 1:
        return _grouped(conv)
    if conv.is_native:
        return _native(conv)
    if conv.is_channels_last:
        return _channels_last(conv)
    return _brought_to_channels_last(conv) if conv.by is Multiplier.AMX else _blocked(conv)


def _grouped(conv: Convolution) -> int:
    """A convolution in groups of channels: an upper estimate, close where every channel is a group of its own."""
    x, weight, out = conv.x, conv.weight, conv.out
    if x.dtype != torch.float32 and conv.by in (Multiplier.AMX, Multiplier.LOOPS):
        return sum(map(_nbytes, (x, weight, out)))  # not measured
    if conv.is_channels_last:
        is_depthwise = weight.shape[1] == 1
        return _padded(weight, 0) if is_depthwise else max(2 * _nbytes(weight), _nbytes(x))
    return _padded(x, 1) + _padded(weight, 0) + _padded(out, 1) - _nbytes(out)


def _padded(x: torch.Tensor, dim: int) -> int:
    """Bytes with one dimension filled up to whole blocks."""
    return _nbytes(x) // max(1, x.shape[dim]) * _up(x.shape[dim], BLOCK)


def _of_enlargement(x: torch.Tensor, out: torch.Tensor) -> int:
    """Kernels work with channels last, and bring source and result there and back."""
    return 0 if x.shape[1] <= FEW_CHANNELS or is_channels_last(x) else _nbytes(x) + _nbytes(out)


def _native(conv: Convolution) -> int:
    """The columns of every entry, and both tensors in one order and without gaps; a clip's order is the usual one."""
    columns = 0 if conv.is_pointwise and not conv.is_strided else _columns(conv)
    if conv.out.ndim == 5:
        return columns + sum(_nbytes(tensor) for tensor in (conv.x, conv.weight) if not tensor.is_contiguous())
    other = conv.weight if is_channels_last(conv.x) else conv.x  # the one without channels last is brought to them
    reordered = _nbytes(other) if not conv.is_pointwise and not _same_order(conv) else 0
    is_whole = conv.x.is_contiguous() or is_channels_last(conv.x)
    return columns + reordered + (0 if is_whole else _nbytes(conv.x))


def _columns(conv: Convolution) -> int:
    return math.prod(conv.sizes) * conv.x.shape[1] * conv.out[0, 0].numel() * len(conv.x) * conv.x.itemsize


def _channels_last(conv: Convolution) -> int:
    """oneDNN with channels last: the weight in blocks, a scratchpad, and what did not have its channels last."""
    others = sum(_nbytes(tensor) for tensor in (conv.x, conv.weight) if not is_channels_last(tensor))
    return others + _weight_in_blocks(conv) + _scratchpad(conv)


def _brought_to_channels_last(conv: Convolution) -> int:
    """AMX with channels first: source and result are brought to channels last and back."""
    result = _nbytes(conv.out)
    return _copied_before(conv) + max(_scratchpad(conv) + _nbytes(conv.x) + _weight_in_blocks(conv), 2 * result)


def _copied_before(conv: Convolution) -> int:
    """PyTorch copies what has gaps, or its dimensions in another order."""
    return sum(_nbytes(tensor) for tensor in (conv.x, conv.weight) if not tensor.is_contiguous())


def _blocked(conv: Convolution) -> int:
    """Else, with channels first: everything is brought in blocks of channels, and the result back."""
    x, out = conv.x, conv.out
    channels_in, channels_out = _up(x.shape[1], BLOCK), _up(out.shape[1], BLOCK)
    is_flat = x.shape[1] < BLOCK and not conv.is_pointwise  # the source as it is
    taken_in = x.shape[1] if is_flat else channels_in
    source = 0 if is_flat else len(x) * channels_in * x[0, 0].numel() * x.itemsize
    weight = taken_in * channels_out * math.prod(conv.sizes) * x.itemsize
    result = len(x) * channels_out * out[0, 0].numel() * x.itemsize
    scratch = 0
    if conv.has_bias and channels_out != out.shape[1]:
        scratch += channels_out * x.itemsize + BOOKED
    if conv.is_pointwise and conv.is_strided:
        scratch += torch.get_num_threads() * channels_in * out[0, 0].numel() * x.itemsize + BOOKED
    if conv.is_pointwise and x.itemsize == 2:
        scratch += _sums(conv, channels_out)
    return _copied_before(conv) + max(scratch + source + weight + result - _nbytes(out), result)


def _sums(conv: Convolution, channels: int) -> int:
    """For each thread the result of one picture in float32, and with AVX-512 alone two more numbers a channel."""
    more = 8 * channels if conv.by is Multiplier.AVX512 else 0
    return torch.get_num_threads() * (4 * channels * conv.out[0, 0].numel() + more) + BOOKED


def _weight_in_blocks(conv: Convolution) -> int:
    size, (channels_out, channels_in) = conv.weight.itemsize, conv.weight.shape[:2]
    if size == 4:
        blocks = (64, 32) if conv.is_pointwise else (64, 48, 32)
        wide = _up(channels_out, BLOCK) if channels_out <= BLOCK else min(_up(channels_out, block) for block in blocks)
        if channels_out % BLOCK == 0:
            wide = channels_out
        return wide * channels_in * math.prod(conv.sizes) * size
    wide = channels_out if channels_out % BLOCK == 0 else _up(channels_out, BLOCK if channels_out < BLOCK else 32)
    return wide * _up(channels_in, 32 if channels_in > 32 else 2) * math.prod(conv.sizes) * size


def _scratchpad(conv: Convolution) -> int:
    """Of oneDNN with channels last: little, but with AMX the rows under way, arranged for products."""
    threads, fixed = torch.get_num_threads(), 24
    if conv.by is not Multiplier.AMX:
        sums = _sums(conv, _up(len(conv.weight), BLOCK)) if conv.is_pointwise and conv.by is Multiplier.AVX512 else 0
        pages = 7 if conv.x.itemsize == 2 and conv.x.shape[1] > 512 else 2
        return threads * pages * PAGE + fixed + sums
    if not conv.is_padded and (conv.is_pointwise or conv.is_strided):
        return threads * 5 * PAGE + fixed
    key = (conv.out.ndim - 2, 2 if conv.is_strided else 1)
    return threads * pages_of_scratch(key, conv.x.shape[1], conv.x.shape[-1]) * PAGE + fixed


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
    rounded = threads * some_queries * _up(some_keys, 2) * size
    slices = -(-batch * heads * -(-queries // some_queries) // threads)
    if Multiplier.of(q.dtype) is not Multiplier.AMX or slices * some_queries < 4 * batch * heads:  # too few products
        return scores + rounded
    arranged = batch * heads * head * (keys + _up(keys, 2)) * size
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
        return MATRIX_FIXED + 2 * _up(inner, 64) * _up(columns, 64)
    return _of_linear(rows, inner, columns) if second.stride(0) == 1 else scratch_of_product(rows, inner, columns)


def _of_avx512(by: Multiplier, rows: int, inner: int, columns: int) -> int:
    """The result in float32; with bfloat16 some of it at a time, and some of the second matrix, arranged."""
    if by is Multiplier.AVX512:
        return _up(4 * rows * columns, BOOKED) + 2 * BOOKED
    deep = 512 if inner <= 1024 or rows == 1 else 1024
    some = 2**10 + 4 * min(rows, 256) * min(columns, 64) + 2 * 64 * min(_up(inner, 32), deep)
    return torch.get_num_threads() * some


def _of_linear(rows: int, inner: int, columns: int) -> int:
    """`[rows, inner]` times a weight `[columns, inner]`: an upper estimate, measured from 1 to 4096 rows.

    The weight is arranged whole where it is used often, else some columns at a time; a long first matrix, too.
    """
    some = 66 * inner + (128 * (rows + 1) if inner >= 512 else 0)
    some = max(some, 128 * inner) if rows == 1 or columns <= 64 else some
    whole = min(MATRIX_PART, 2 * inner * _up(columns, 32))
    long = min(LONG_PART, 2 * rows * inner + (2**18 if inner > 2048 else 128)) if inner > 1536 and rows > 128 else 0
    is_whole = columns <= rows or rows >= 512
    return MATRIX_FIXED + max(whole if is_whole else 0, min(some, 2 * inner * _up(columns, 32) + 2**13), long)


def _same_order(conv: Convolution) -> bool:
    return is_channels_last(conv.x) == is_channels_last(conv.weight)


def _nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.itemsize


def _up(number: int, block: int) -> int:
    return -(-number // block) * block
