"""How fast a device computes what diffusion models are made of: one rate a kind of work, over shapes like theirs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lowtide.ops.quantization import dequantize, quantize

CONVOLUTIONS = ((320, 64), (640, 32), (1280, 16), (128, 192))
"""Channels in and out, and the side of the map: of a UNet's three levels, and of an image's decoder."""
PRODUCTS = ((4096, 320, 2560), (1024, 640, 5120), (256, 1280, 10240), (4096, 320, 320), (256, 1280, 1280))
"""Rows, and features in and out: of feed-forward and projection layers."""
ATTENTIONS = ((4096, 8, 40), (1024, 8, 80))
"""Tokens, heads, and features of a head."""
_REPEATS = 2


class Computing:
    """Measures on one device in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def convolution(self) -> float:
        """Operations a second."""
        pairs = []
        for channels, side in CONVOLUTIONS:
            x, weight = self._some(1, channels, side, side), self._some(channels, channels, 3, 3)
            pairs.append(
                (2 * 9 * channels**2 * side**2, self._seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1)))
            )
        return _rate(pairs)

    def product(self) -> float:
        """Operations a second."""
        pairs = []
        for rows, before, after in PRODUCTS:
            x, weight = self._some(rows, before), self._some(after, before)
            pairs.append((2 * rows * before * after, self._seconds(lambda x=x, w=weight: F.linear(x, w))))
        return _rate(pairs)

    def attention(self) -> float:
        """Operations a second."""
        pairs = []
        for tokens, heads, features in ATTENTIONS:
            q = self._some(1, heads, tokens, features)
            work = 4 * heads * tokens**2 * features
            pairs.append((work, self._seconds(lambda q=q: F.scaled_dot_product_attention(q, q, q))))
        return _rate(pairs)

    def touched(self) -> float:
        """Bytes read and written a second, by what is neither product nor convolution."""
        x = self._some(1, 320, 64, 64)
        each = x.numel() * x.itemsize
        pairs = [
            (2 * each, self._seconds(lambda: F.group_norm(x, 32))),
            (2 * each, self._seconds(lambda: F.silu(x))),
            (3 * each, self._seconds(lambda: x + x)),
        ]
        return _rate(pairs)

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
        pairs = []
        for storage in (torch.float8_e4m3fn, torch.int8):
            values, scale = quantize(weight, storage, scaled=True)
            out = torch.empty_like(weight)
            seconds = self._seconds(lambda v=values, s=scale, o=out: dequantize(v, s, o))
            pairs.append((weight.numel() * weight.itemsize, seconds))
        return _rate(pairs)

    def _some(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=self.dtype, device=self.device)

    def _seconds(self, action: Callable[[], object]) -> float:
        """The quickest of a few runs after one to warm up: others on the machine only ever slow it down."""
        with torch.inference_mode():
            action()
            return min(self._once(action) for _ in range(_REPEATS))

    def _once(self, action: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return max(time.perf_counter() - start, 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rate(pairs: list[tuple[int, float]]) -> float:
    return sum(amount for amount, _ in pairs) / sum(seconds for _, seconds in pairs)
