"""The memory that convolutions take beside their inputs and outputs.

oneDNN brings source, weight and result in an order of its own, and has a scratchpad. What is written here was read from
the allocations of isolated operators (PyTorch 2.13 with oneDNN 3.12, one thread): kernels 1 and 3, strides 1 and 2, in
two and three dimensions, 3 to 2560 channels; sound with kernels up to 8, 4 to 2048 channels. In half precision it
depends on what multiplies; see `Multiplier`. Without AVX-512 blocks of channels are smaller (8 instead of 16), so what
is padded here is an upper estimate there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowtide.ops.meta_device import meant_device
from lowtide.prediction.multiplier import Multiplier
from lowtide.prediction.operators import is_channels_last
from lowtide.prediction.scratchpads import pages_of_scratch

BLOCK = 16
"""Channels that oneDNN computes side by side: both kinds are filled up to multiples."""
ENTRIES_OF_NATIVE = 20480
"""Up to which one map in float32 is convolved by PyTorch itself, by writing every entry down for each of the kernel's.
"""
COLUMNS_AT_ONCE = 2 * 2**20
"""Bytes of columns that oneDNN multiplies at once, at most; it was 1 MB with a cache of as much for each core."""
PAGE = 4096
BOOKED = 128
"""Bytes that oneDNN adds to each part of a scratchpad."""


def has_avx512() -> bool:
    """Whether kernels here use AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution; sizes are those of the kernel and of the maps, without batch and channels.

    Sound, of one dimension, is a map of one row, as PyTorch has it.
    """

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    has_bias: bool
    padding: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    always_onednn: bool
    is_transposed: bool = False

    @classmethod
    def of(cls, name: str, args: Any, given: list[torch.Tensor], out: torch.Tensor) -> Convolution:
        """From the arguments of `aten::convolution`, or of `aten::mkldnn_convolution`."""
        is_own = name == "mkldnn_convolution"
        padding, strides = (args[3], args[4]) if is_own else (args[4], args[3])
        dims, groups = out.ndim - 2, args[6] if is_own else args[8]
        settings = (padding, strides, args[5])
        padding, strides, dilations = (tuple(each) * (dims if len(each) == 1 else 1) for each in settings)
        x, weight = given[:2]
        if dims == 1:
            x, weight, out = (tensor.unsqueeze(2) for tensor in (x, weight, out))
            padding, strides, dilations = (0, *padding), (1, *strides), (1, *dilations)
        is_transposed = not is_own and args[6]
        has_bias = args[2] is not None
        return cls(x, weight, out, has_bias, padding, strides, dilations, groups, is_own, is_transposed)

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
        """Whether results are left out."""
        return any(stride > 1 for stride in self.strides)

    @property
    def leaves_out(self) -> bool:
        """Whether entries are left out, between those of results or of the kernel."""
        return self.is_strided or any(dilation > 1 for dilation in self.dilations)

    @property
    def is_of_a_line(self) -> bool:
        """Whether maps have one row, and the kernel too."""
        return self.out.ndim == 4 and self.x.shape[2] == self.weight.shape[2] == 1

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
        may = self.leaves_out or len(self.x) >= 16 or not self.is_pointwise or torch.get_num_threads() > 1
        is_large = self.groups > 1 or min(self.sizes[-2:]) > 3 or len(self.x) > 1
        return not (may and (is_large or self.x.shape[:4].numel() > ENTRIES_OF_NATIVE))


def of_convolution(conv: Convolution) -> int:
    """Bytes that a convolution has allocated at its peak, beyond its inputs and outputs."""
    if meant_device() not in ("cpu", None):
        # cuDNN's largest workspace is about the maps and the weight once more (against published figures: -0.01 to
        # -0.26 % of whole runs, and -15 to -18 % without).
        return sum(map(nbytes, (conv.x, conv.weight, conv.out)))
    if conv.is_transposed:
        return _transposed(conv)
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
        return sum(map(nbytes, (x, weight, out)))  # not measured
    if conv.is_channels_last:
        is_depthwise = weight.shape[1] == 1
        return _padded(weight, 0) if is_depthwise else max(2 * nbytes(weight), nbytes(x))
    return _padded(x, 1) + _padded(weight, 0) + _padded(out, 1) - nbytes(out)


def _padded(x: torch.Tensor, dim: int) -> int:
    """Bytes with one dimension filled up to whole blocks."""
    return nbytes(x) // max(1, x.shape[dim]) * up(x.shape[dim], BLOCK if has_avx512() else BLOCK // 2)


def _native(conv: Convolution) -> int:
    """The columns of every entry, and both tensors in one order and without gaps; a clip's order is the usual one."""
    columns = 0 if conv.is_pointwise and not conv.is_strided else _columns(conv)
    if conv.out.ndim == 5:
        return columns + sum(nbytes(tensor) for tensor in (conv.x, conv.weight) if not tensor.is_contiguous())
    other = conv.weight if is_channels_last(conv.x) else conv.x  # the one without channels last is brought to them
    reordered = nbytes(other) if not conv.is_pointwise and not _same_order(conv) else 0
    is_whole = conv.x.is_contiguous() or is_channels_last(conv.x)
    return columns + reordered + (0 if is_whole else nbytes(conv.x))


def _columns(conv: Convolution) -> int:
    return math.prod(conv.sizes) * conv.x.shape[1] * conv.out[0, 0].numel() * len(conv.x) * conv.x.itemsize


def _channels_last(conv: Convolution) -> int:
    """oneDNN with channels last: the weight in blocks, a scratchpad, and what did not have its channels last."""
    others = sum(nbytes(tensor) for tensor in (conv.x, conv.weight) if not is_channels_last(tensor))
    return others + _weight_in_blocks(conv) + _scratchpad(conv)


def _brought_to_channels_last(conv: Convolution) -> int:
    """AMX with channels first: source and result are brought to channels last and back."""
    result = nbytes(conv.out)
    return _copied_before(conv) + max(_scratchpad(conv) + nbytes(conv.x) + _weight_in_blocks(conv), 2 * result)


def _copied_before(conv: Convolution) -> int:
    """PyTorch copies what has gaps, or its dimensions in another order."""
    return sum(nbytes(tensor) for tensor in (conv.x, conv.weight) if not tensor.is_contiguous())


def _blocked(conv: Convolution) -> int:
    """Else, with channels first: everything is brought in blocks of channels, and the result back."""
    x, out = conv.x, conv.out
    channels_in, channels_out = up(x.shape[1], BLOCK), up(out.shape[1], BLOCK)
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
    if conv.is_of_a_line and conv.leaves_out and not has_avx512():
        scratch += 2 * nbytes(x)  # up to that: kernels make it as the caches are
    if conv.by is Multiplier.BFLOAT16 and x.itemsize == 2 and conv.padding[-1] >= BLOCK:
        result = max(result, _by_columns(conv))
    return _copied_before(conv) + max(scratch + source + weight + result - nbytes(out), result)


def _by_columns(conv: Convolution) -> int:
    """What oneDNN takes where it has no kernel: some columns, as many as a cache holds, and the result in float32."""
    return torch.get_num_threads() * min(_columns(conv), COLUMNS_AT_ONCE) + 4 * conv.out.numel() + 2 * BOOKED


def _sums(conv: Convolution, channels: int) -> int:
    """For each thread the result of one picture in float32, and with AVX-512 alone two more numbers a channel."""
    more = 8 * channels if conv.by is Multiplier.AVX512 else 0
    return torch.get_num_threads() * (4 * channels * conv.out[0, 0].numel() + more) + BOOKED


def _weight_in_blocks(conv: Convolution) -> int:
    size, (channels_out, channels_in) = conv.weight.itemsize, conv.weight.shape[:2]
    if size == 4:
        blocks = (64, 32) if conv.is_pointwise else (64, 48, 32)
        wide = up(channels_out, BLOCK) if channels_out <= BLOCK else min(up(channels_out, block) for block in blocks)
        if channels_out % BLOCK == 0:
            wide = channels_out
        if not has_avx512():
            wide = max(up(channels_out, block) for block in (BLOCK, 24))
        return wide * channels_in * math.prod(conv.sizes) * size
    wide = channels_out if channels_out % BLOCK == 0 else up(channels_out, BLOCK if channels_out < BLOCK else 32)
    return wide * up(channels_in, 32 if channels_in > 32 else 2) * math.prod(conv.sizes) * size


def _scratchpad(conv: Convolution) -> int:
    """Of oneDNN with channels last: little, but with AMX the rows under way, arranged for products."""
    threads, fixed = torch.get_num_threads(), 24
    if conv.by is not Multiplier.AMX:
        sums = _sums(conv, up(len(conv.weight), BLOCK)) if conv.is_pointwise and conv.by is Multiplier.AVX512 else 0
        pages = 7 if conv.x.itemsize == 2 and conv.x.shape[1] > 512 else 2
        return threads * pages * PAGE + fixed + sums
    if conv.is_of_a_line and not conv.is_pointwise:
        return threads * _of_a_line(conv) + fixed
    if not any(conv.padding) and (conv.is_pointwise or conv.is_strided):
        return threads * _of_unpadded(conv) + fixed
    key = (conv.out.ndim - 2, 2 if conv.is_strided else 1)
    return threads * pages_of_scratch(key, conv.x.shape[1], conv.x.shape[-1]) * PAGE + fixed


def _of_unpadded(conv: Convolution) -> int:
    """With AMX, of kernels of one entry, and of strided ones on maps that were padded before; an upper estimate.

    Patches, as encoders of pictures begin with, were measured for kernels of 14, 16 and 32 and maps of 224 to 512.
    """
    if conv.is_pointwise:
        return 5 * PAGE
    width, sides = conv.out.shape[-1], conv.sizes
    if min(sides) > 3 and sides == conv.strides:
        most = 476_000 if sides[-1] % BLOCK and width % BLOCK == 0 else 90_000
        return most * conv.x.shape[-1] + _weight_in_blocks(conv)
    return 14 * PAGE if width >= 64 else pages_of_scratch((2, 2), 2 * conv.x.shape[1], conv.x.shape[-1]) * PAGE


def _of_a_line(conv: Convolution) -> int:
    """With AMX: what is read, filled up, and of short lines more, arranged for products."""
    channels = conv.x.shape[1]
    pixel = (channels if channels <= BLOCK else up(channels, 2 * BLOCK)) * conv.x.itemsize
    stride, count = conv.strides[-1], conv.out.shape[-1]
    beside = (conv.sizes[-1] - 1) * conv.dilations[-1] + 4
    blocks = min(4 * count * pixel, max(208 * pixel, 25 * PAGE))
    return 12 * PAGE + stride**2 * max((count + beside) * pixel, blocks)


def _transposed(conv: Convolution) -> int:
    """A transposed convolution: an upper estimate, close where maps have their channels first."""
    x, weight, out = map(nbytes, (conv.x, conv.weight, conv.out))
    if conv.groups > 1:
        return x + weight + 2 * out  # not measured
    if conv.is_native:
        return _transposed_natively(conv)
    in_blocks = _weight_in_blocks(replace(conv, weight=conv.weight.transpose(0, 1)))
    if conv.is_channels_last:
        return x + weight + in_blocks + torch.get_num_threads() * (32 if conv.x.itemsize == 2 else 20) * PAGE
    has_amx = conv.by is Multiplier.AMX and conv.x.itemsize == 2
    source = nbytes(conv.x) // conv.x.shape[1] * up(conv.x.shape[1], 2 * BLOCK if has_amx else BLOCK)
    unstrided = x if has_amx else _padded(conv.out, 1)
    scratch = 4 * conv.x.numel() if conv.is_strided else unstrided
    return max(2 * out, source + in_blocks + scratch + torch.get_num_threads() * (12 if has_amx else 10) * PAGE)


def _transposed_natively(conv: Convolution) -> int:
    """The columns that are added up; of clips ones for the bias, and everything in the usual order."""
    x, weight, out = conv.x, conv.weight, conv.out
    columns = math.prod(conv.sizes) * out.shape[1] * x[0, 0].numel() * x.itemsize
    if out.ndim == 5:
        return columns + out[0, 0].numel() * x.itemsize + sum(nbytes(y) for y in (x, weight) if not y.is_contiguous())
    return columns + (0 if _same_order(conv) else nbytes(weight if is_channels_last(x) else x))


def _same_order(conv: Convolution) -> bool:
    return is_channels_last(conv.x) == is_channels_last(conv.weight)


def nbytes(x: torch.Tensor) -> int:
    """Bytes of a tensor's numbers, without gaps."""
    return x.numel() * x.itemsize


def up(number: int, block: int) -> int:
    """The multiple of `block` that a number is filled up to."""
    return -(-number // block) * block
