"""How fast a device computes what diffusion models are made of: one rate a kind of work, over shapes like theirs.

Where a kind of work is slow, as half precision is on processors without instructions for it, the smallest shapes speak
for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from lowtide.machine.accelerators import accelerator
from lowtide.machine.heap import steady_malloc
from lowtide.ops.block_layout import Q4_0
from lowtide.ops.block_quantization import dequantize_blocks, quantize_blocks
from lowtide.ops.int8_products import (
    COMPUTED,
    has_int8_products,
    int8_convolution,
    int8_product,
    pack_int8_convolution,
    pack_int8_product,
)
from lowtide.ops.packed import Geometry, has_packed, pack_convolution, pack_product, packed_convolution, packed_product
from lowtide.ops.product_attention import is_by_products, product_attention
from lowtide.ops.quantization import dequantize, quantize

CONVOLUTIONS = ((2, 640, 8), (2, 1280, 8), (2, 1280, 16), (2, 640, 32), (2, 320, 64))
"""Maps, channels in and out, and the side of a map: of a UNet's levels, with guidance."""
CHANNELS_LAST = ((1, 512, 16), (1, 512, 64), (1, 256, 128), (1, 128, 256))
"""The same of an image's decoder."""
PRODUCTS = ((8192, 320, 320), (128, 1280, 10240), (512, 1280, 10240), (2048, 640, 5120), (8192, 320, 2560))
"""Rows, and features in and out: of feed-forward and projection layers."""
ATTENTIONS = ((1024, 8, 80), (4096, 8, 40))
"""Tokens, heads, and features of a head."""
AROUND: Geometry = ((1, 1), (1, 1), (1, 1), 1)
"""Of these convolutions: maps keep their sides."""
_REPEATS = 5
_ENOUGH = 0.06
"""Seconds after which a kernel is not repeated, but once."""
_SLOW = 0.25
"""Seconds of one kernel from which on it is not repeated, and no larger one is tried."""

Action = Callable[[], object]


class Computing:
    """Measures on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def convolution(self) -> float:
        """Operations a second."""
        return self._convolved(CONVOLUTIONS, torch.contiguous_format)

    def channels_last(self) -> float:
        """Operations a second, for maps with their channels last and weights as they lie in files."""
        return self._convolved(CHANNELS_LAST, torch.channels_last)

    def _convolved(self, shapes: tuple[tuple[int, int, int], ...], layout: torch.memory_format) -> float:
        return self._rate(self._convolutions(self._plain, shapes, layout))

    def packed_convolution(self) -> float:
        """Operations a second with packed weights; 0 where there are none."""
        return self._rate(self._convolutions(self._packed, CONVOLUTIONS)) if self._packs else 0.0

    def int8_convolution(self) -> float:
        """Operations a second with weights and inputs in int8; 0 where there are no instructions for it."""
        return self._rate(self._convolutions(_in_int8, CONVOLUTIONS)) if self._multiplies_in_int8 else 0.0

    def _convolutions(
        self,
        convolution: Callable[[torch.Tensor], Action],
        shapes: tuple[tuple[int, int, int], ...],
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[int, Action]]:
        """Operations, and what `convolution` makes of a map, with as many channels out as in."""
        for count, channels, side in shapes:
            x = self._some(count, channels, side, side).contiguous(memory_format=layout)
            yield 2 * 9 * count * channels**2 * side**2, convolution(x)

    def _plain(self, x: torch.Tensor) -> Action:
        return partial(F.conv2d, x, self._weight_for(x), padding=1)

    def _packed(self, x: torch.Tensor) -> Action:
        packed = pack_convolution(self._weight_for(x), AROUND, x.shape)
        return partial(packed_convolution, x, packed, None, AROUND)

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        return self._some(x.shape[1], x.shape[1], 3, 3)

    def arranging(self) -> float:
        """Bytes of weights a second that convolutions bring to their own order in each call; 0 where that is nothing.

        It is what they take longer than with packed weights, where maps are small.
        """
        if not self._packs:
            return 0.0
        saved, nbytes = 0.0, 0
        both = self._convolutions(self._plain, CONVOLUTIONS), self._convolutions(self._packed, CONVOLUTIONS)
        for (_, channels, _), (_, one), (_, other) in zip(CONVOLUTIONS, *both, strict=True):
            taken = self._seconds(one)
            saved += taken - self._seconds(other)
            nbytes += 9 * channels**2 * self.dtype.itemsize
            if taken > _SLOW:
                break
        return nbytes / saved if saved > 0 else 0.0

    def packed_product(self) -> float:
        """Operations a second with packed weights; 0 where there are none."""

        def multiplied(x: torch.Tensor, after: int) -> Action:
            return partial(packed_product, x, pack_product(self._some(after, x.shape[1]), len(x)), None)

        return self._rate(self._products(multiplied)) if self._packs else 0.0

    def int8_product(self) -> float:
        """Operations a second with weights and inputs in int8; 0 where there are no instructions for it."""

        def multiplied(x: torch.Tensor, after: int) -> Action:
            packed = pack_int8_product(_eights(after, x.shape[1]), len(x))
            return partial(int8_product, x, packed, torch.ones(after), None)

        return self._rate(self._products(multiplied)) if self._multiplies_in_int8 else 0.0

    def _products(self, product: Callable[[torch.Tensor, int], Action]) -> Iterator[tuple[int, Action]]:
        """Operations, and what `product` makes of rows and the number of features after it."""
        for rows, before, after in PRODUCTS:
            yield 2 * rows * before * after, product(self._some(rows, before), after)

    def packing(self) -> float:
        """Bytes of weights that are packed a second; 1 where none are."""
        if not self._packs:
            return 1.0
        weight, size = self._some(1280, 1280, 3, 3), torch.Size((2, 1280, 16, 16))
        action = partial(pack_convolution, weight, AROUND, size)
        return self._rate([(weight.nbytes, action)])

    @property
    def _multiplies_in_int8(self) -> bool:
        return self.device.type == "cpu" and self.dtype in COMPUTED and has_int8_products()

    @property
    def _packs(self) -> bool:
        return self.device.type == "cpu" and has_packed(self.dtype)

    def product(self) -> float:
        """Operations a second."""
        return self._rate(self._products(lambda x, after: partial(F.linear, x, self._some(after, x.shape[1]))))

    def attention(self) -> float:
        """Operations a second."""

        def cases() -> Iterator[tuple[int, Action]]:
            for tokens, heads, features in ATTENTIONS:
                q = self._some(1, heads, tokens, features)
                yield 4 * heads * tokens**2 * features, partial(F.scaled_dot_product_attention, q, q, q)

        return self._rate(cases())

    def product_attention(self) -> float:
        """Operations a second where own products compute it; 0 where they do not."""
        tokens, heads, features = ATTENTIONS[-1]
        q = self._some(1, heads, tokens, features)
        if not is_by_products(q, q, q):
            return 0.0
        return self._rate([(4 * heads * tokens**2 * features, partial(product_attention, q, q, q))])

    def touched(self) -> float:
        """Bytes read and written a second by what is neither product nor convolution, also in another order."""
        x, wide = self._some(2, 320, 64, 64), self._some(2, 4096, 1280)
        rows = x.flatten(2).transpose(1, 2)
        actions: list[tuple[int, Action]] = [
            (2, lambda: F.group_norm(x, 32)),
            (2, lambda: F.layer_norm(rows.contiguous(), (320,))),
            (2, rows.contiguous),
            (3, lambda: rows + x.view(2, 4096, 320)),
            (2 * wide.numel() // x.numel(), lambda: F.gelu(wide)),
        ]
        each = x.numel() * x.itemsize
        return self._rate((times * each, action) for times, action in actions)

    def renewing(self) -> float:
        """Seconds that a byte touched takes longer where its page is made anew each time.

        To be asked last: from then on this process's heap gives freed memory back at once.
        """
        x = self._some(12 * 2**20)
        out = torch.empty_like(x)
        reused = self._seconds(lambda: torch.mul(x, 2, out=out))
        steady_malloc()
        renewed = self._seconds(lambda: torch.mul(x, 2))
        return max(renewed - reused, 0.0) / (2 * x.numel() * x.itemsize)

    def kernel(self) -> float:
        """Seconds from one kernel's beginning to the next's, where there is next to nothing to compute."""
        x, layer, count = self._some(8), torch.nn.SiLU(), 200

        def many() -> None:
            for _ in range(count):
                layer(x)

        return self._seconds(many) / count

    def dequantized(self) -> float:
        """Bytes of working numbers a second made of 8-bit ones, the mean of fp8 and int8."""
        weight = self._some(1280, 1280)

        def cases() -> Iterator[tuple[int, Action]]:
            for storage in (torch.float8_e4m3fn, torch.int8):
                values, scale = quantize(weight, storage, scaled=True)
                yield weight.nbytes, partial(dequantize, values, scale, torch.empty_like(weight))

        return self._rate(cases())

    def dequantized_from_4(self) -> float:
        """Bytes of working numbers a second made of 4-bit ones."""
        weight = self._some(1280, 1280)
        blocks = quantize_blocks(weight, Q4_0)
        return self._rate([(weight.nbytes, partial(dequantize_blocks, blocks, torch.empty_like(weight)))])

    def _some(self, *shape: int) -> torch.Tensor:
        """Numbers that are quickly made: kernels take as long for any."""
        return torch.full(shape, 0.1, device=self.device, dtype=self.dtype)

    def _rate(self, cases: Iterable[tuple[int, Action]]) -> float:
        """Amounts of work a second, over all cases up to the first that is slow."""
        amount, seconds = 0, 0.0
        for work, action in cases:
            taken = self._seconds(action, is_warm=amount > 0)
            amount, seconds = amount + work, seconds + taken
            if taken > _SLOW:
                break
        return amount / seconds

    def _seconds(self, action: Action, *, is_warm: bool = False) -> float:
        """The least seconds of some runs, after one to warm up: others may be at work beside us.

        Where a kernel of the kind `is_warm`, one run is enough if it is long.
        """
        with torch.inference_mode():
            first = self._once(action)
            if first > (_ENOUGH if is_warm else _SLOW):
                return first
            taken = [*([first] if is_warm else []), self._once(action)]
            while len(taken) < _REPEATS and sum(taken) < _ENOUGH:
                taken.append(self._once(action))
            return min(taken)

    def _once(self, action: Action) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return max(time.perf_counter() - start, 1e-9)

    def _wait(self) -> None:
        kind = accelerator(self.device)
        if kind is not None:
            kind.synchronize(self.device)


def _in_int8(x: torch.Tensor) -> Action:
    channels = x.shape[1]
    packed = pack_int8_convolution(_eights(channels, channels, 3, 3), AROUND, x.shape)
    return partial(int8_convolution, x, packed, torch.ones(channels), None, AROUND)


def _eights(*shape: int) -> torch.Tensor:
    """Weights in int8."""
    return torch.full(shape, 8, dtype=torch.int8)
