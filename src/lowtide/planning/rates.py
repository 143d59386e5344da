"""What a machine does in a second: one of the two things that plans are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lowtide.planning.workload import Stage, Work, Workload

HOLES, HOLES_MOST = 0.1, 24 * 2**20
"""What a CPU's heap takes beside the bytes in use where freed memory goes back at once: holes between blocks, up to
16 MiB in a decoder."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, for one device and dtype.

    Operations of `convolution`, `product` and `attention`; bytes `touched`; seconds a `kernel` takes to begin. Bytes
    that come to the device a second: over the `link` from host memory (on a CPU: by mapping pages that are in memory),
    `converted` where the dtype changes or bytes are copied, and from the `disk`. `cache` bytes of files stay in the
    system's memory, so that they are read from the disk once. `base` bytes are taken by the process itself on the host,
    `device_base` on the device, before anything is loaded; `slack` is the share of activations that an allocator takes
    on top, at most `slack_most` bytes. `frugal_touched` are bytes touched a second where freed memory goes back to the
    system at once, with hardly any slack; 0 where that cannot be chosen. `dequantized` bytes of working numbers a
    second are made of 8-bit ones. For each second of loading beside computing, computing loses `contention` of a
    second: a CPU's reader takes time from it. `channels_last` are operations of convolutions of such maps, 0 where they
    are as fast as others. `assumed` where these are usual figures, not measured ones.
    """

    device: str
    convolution: float
    product: float
    attention: float
    touched: float
    kernel: float
    link: float
    converted: float
    disk: float
    cache: int
    base: int
    device_base: int = 0
    slack: float = 0.0
    slack_most: int = 2**62
    frugal_touched: float = 0.0
    dequantized: float = 1e10
    contention: float = 0.0
    channels_last: float = 0.0
    assumed: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.device == "cpu"

    def in_workload(self, workload: Workload) -> Rates:
        """The rates for a run: a CPU's heap keeps no more than the stages that fill it have in use."""
        if self.frugal is None:
            return self
        filling = (call.peak + one.carried for one in workload.stages if one.keeps_heap for call in one.ways.values())
        return replace(self, slack_most=min(self.slack_most, int(self.slack * max(filling, default=0))))

    def gives_back(self, stage: Stage) -> bool:
        """Whether freed memory goes back to the system at once in a stage: wherever keeping it is not worth it."""
        return self.is_frugal or (self.frugal is not None and not stage.keeps_heap)

    def in_stage(self, stage: Stage) -> Rates:
        """The rates in a stage."""
        return self.frugal or self if self.gives_back(stage) else self

    @property
    def is_frugal(self) -> bool:
        """Whether freed memory goes back to the system at once in all stages."""
        return self.frugal_touched > 0 and self.touched == self.frugal_touched

    @cached_property
    def frugal(self) -> Rates | None:
        """The rates where freed memory goes back to the system at once, if that can be chosen."""
        if not self.frugal_touched or self.is_frugal:
            return None
        return replace(self, slack=min(self.slack, HOLES), slack_most=HOLES_MOST, touched=self.frugal_touched)

    def seconds(self, work: Work) -> float:
        """How long computing takes, with the weights at hand; reading them may be what takes longest."""
        weighted = (
            work.convolution / self.convolution
            + work.channels_last / (self.channels_last or self.convolution)
            + work.product / self.product
        )
        return (
            max(weighted, work.weights / self.touched)
            + work.attention / self.attention
            + work.touched / self.touched
            + work.kernels * self.kernel
        )
