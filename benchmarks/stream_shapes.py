"""The units of four published networks, in the order in which they are computed with: bytes, and operations of a step.

By arithmetic from their configurations; nothing is loaded or built. A unit is what a rule of blocks moves at once: a
repeated block, or a layer outside those. Weights take two bytes a number. A multiplication and an addition are two
operations; norms and activations are left out, as if they were hidden in the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

WIDE = 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Block:
    """A unit."""

    name: str
    nbytes: int
    operations: float


def block(name: str, numbers: int, operations: float) -> Block:
    return Block(name, numbers * WIDE, operations)


# ---- U-Nets: `side` of a map, channels in and out, two pictures for guidance


@dataclass(frozen=True)
class UNet:
    """The configuration of a U-Net: channels of its levels, and the transformer blocks in each attention there."""

    side: int
    channels: tuple[int, ...]
    deep: tuple[int, ...]
    middle: int
    words: int
    pooled: int = 0
    tokens: int = 77
    pictures: int = 2

    def units(self) -> Iterator[Block]:
        first, last = self.channels[0], len(self.channels) - 1
        yield self.layer("time.1", first, 4 * first, 1)
        yield self.layer("time.2", 4 * first, 4 * first, 1)
        if self.pooled:
            yield self.layer("pooled.1", self.pooled, 4 * first, 1)
            yield self.layer("pooled.2", 4 * first, 4 * first, 1)
        yield self.conv("in", 4, first, self.side)
        side, width, skips = self.side, first, [first]
        for level, channels in enumerate(self.channels):
            for place in range(2):
                yield from self.stage(f"down.{level}.{place}", width, channels, side, self.deep[level])
                width = channels
                skips.append(width)
            if level < last:
                side //= 2
                yield self.conv(f"down.{level}.smaller", width, width, side)
                skips.append(width)
        yield self.residual("middle.0", width, width, side)
        yield from self.attention("middle", width, side, self.middle, alone=True)
        yield self.residual("middle.1", width, width, side)
        for level in range(last, -1, -1):
            for place in range(3):
                wide = width + skips.pop()
                yield from self.stage(f"up.{level}.{place}", wide, self.channels[level], side, self.deep[level])
                width = self.channels[level]
            if level:
                side *= 2
                yield self.conv(f"up.{level}.larger", width, width, side)
        yield self.conv("out", width, 4, side)

    def stage(self, name: str, into: int, out: int, side: int, deep: int) -> Iterator[Block]:
        yield self.residual(f"{name}.residual", into, out, side)
        if deep:
            yield from self.attention(name, out, side, deep, alone=False)

    def layer(self, name: str, into: int, out: int, tokens: int, attended: float = 0.0) -> Block:
        return block(name, into * out + out, 2.0 * into * out * tokens * self.pictures + attended)

    def conv(self, name: str, into: int, out: int, side: int, kernel: int = 3) -> Block:
        numbers = kernel**2 * into * out
        return block(name, numbers + out, 2.0 * numbers * side**2 * self.pictures)

    def residual(self, name: str, into: int, out: int, side: int) -> Block:
        time = 4 * self.channels[0]
        parts = [self.conv(name, into, out, side), self.conv(name, out, out, side), self.layer(name, time, out, 1)]
        if into != out:
            parts.append(self.conv(name, into, out, side, 1))
        return together(name, parts)

    def attention(self, name: str, width: int, side: int, deep: int, *, alone: bool) -> Iterator[Block]:
        """One of several blocks is a unit; a single one, with the layers around it, if the attention has a sister."""
        around = self.conv(f"{name}.in", width, width, side, 1), self.conv(f"{name}.out", width, width, side, 1)
        blocks = [self.transformer(f"{name}.block.{place}", width, side) for place in range(deep)]
        if deep == 1 and not alone:
            yield together(name, [around[0], *blocks, around[1]])
            return
        yield around[0]
        yield from blocks if deep > 1 else self.transformer_layers(name, width, side)
        yield around[1]

    def transformer(self, name: str, width: int, side: int) -> Block:
        return together(name, list(self.transformer_layers(name, width, side)))

    def transformer_layers(self, name: str, width: int, side: int) -> Iterator[Block]:
        tokens, wide = side**2, 4 * width
        attended = [4.0 * tokens * seen * width * self.pictures for seen in (tokens, self.tokens)]
        yield from [self.layer(f"{name}.self", width, width, tokens)] * 3
        yield self.layer(f"{name}.self.out", width, width, tokens, attended[0])
        yield self.layer(f"{name}.query", width, width, tokens)
        yield from [self.layer(f"{name}.words", self.words, width, self.tokens)] * 2
        yield self.layer(f"{name}.words.out", width, width, tokens, attended[1])
        yield self.layer(f"{name}.up", width, 2 * wide, tokens)
        yield self.layer(f"{name}.down", wide, width, tokens)


def together(name: str, parts: list[Block]) -> Block:
    return Block(name, sum(part.nbytes for part in parts), sum(part.operations for part in parts))


# ---- transformers


def flux(tokens: int = 4096, words: int = 512, width: int = 3072) -> Iterator[Block]:
    """FLUX.1: 19 blocks of two streams, 38 of one; 1024² pixels."""
    both, square = tokens + words, width * width
    attended = 4.0 * both * both * width
    for name, into in (("x", 64), ("words", 4096), ("time.1", 256), ("time.2", width)):
        yield block(f"{name}.in", into * width, 2.0 * into * width * {"x": tokens, "words": words}.get(name, 1))
    for name, into in (("guidance.1", 256), ("guidance.2", width), ("pooled.1", 768), ("pooled.2", width)):
        yield block(f"{name}.in", into * width, 2.0 * into * width)
    for place in range(19):
        yield block(f"two.{place}", 2 * 18 * square, 2.0 * 12 * square * both + attended)
    for place in range(38):
        yield block(f"one.{place}", 15 * square, 2.0 * 12 * square * both + attended)
    yield block("modulation", 2 * square, 4.0 * square)
    yield block("out", 64 * width, 2.0 * 64 * width * tokens)


def wan(tokens: int = 21 * 30 * 52, words: int = 512, width: int = 5120, inner: int = 13824) -> Iterator[Block]:
    """Wan 2.1 14B: 40 blocks; 81 frames of 832 x 480 pixels, 32,760 tokens; one of the two calls of guidance."""
    yield block("patches", 16 * 4 * width, 2.0 * 16 * 4 * width * tokens)
    yield block("time.1", 256 * width, 2.0 * 256 * width)
    yield block("time.2", width * width, 2.0 * width * width)
    yield block("modulation", 6 * width * width, 2.0 * 6 * width * width)
    yield block("words.1", 4096 * width, 2.0 * 4096 * width * words)
    yield block("words.2", width * width, 2.0 * width * width * words)
    square = width * width
    products = 2.0 * tokens * (6 * square + 2 * width * inner) + 2.0 * words * 2 * square
    for place in range(40):
        attended = 4.0 * tokens * (tokens + words) * width
        yield block(f"block.{place}", 8 * square + 2 * width * inner, products + attended)
    yield block("out", 64 * width, 2.0 * 64 * width * tokens)


SHAPES: dict[str, Callable[[], Iterator[Block]]] = {
    "SD 1.5": UNet(64, (320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768).units,
    "SDXL": UNet(128, (320, 640, 1280), (0, 2, 10), 10, 2048, pooled=2816).units,
    "FLUX": flux,
    "Wan 14B": wan,
}
"""At 512², 1024² and 1024² pixels, and at 81 frames of 832 x 480."""
NUMBERS = {"SD 1.5": 0.8595, "SDXL": 2.5675, "FLUX": 11.90, "Wan 14B": 14.29}
"""Weights, in 10**9, as their makers publish them: what the arithmetic is held against."""
