"""How fast a machine computes, reads and copies: with the workload, what plans are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowtide.planning.workload import Stage, Work, Workload

HOLES, HOLES_MOST = 0.1, 96 * 2**20
"""Holes between blocks in a CPU's heap that gives freed memory back at once, and what of its large pages is not asked
for: a share of the bytes in use, and the most bytes. In a decoder up to 75 MiB were measured; 16 without these."""


@dataclass(frozen=True)
class Rates:
    """The speed of one device for one dtype, and the memory that a process takes there.

    Operations a second: `convolution`, `product` and `attention`; `channels_last` for convolutions of maps in that
    layout, 0 where they are as fast as others; `packed_convolution` and `packed_product` with packed weights, 0 where
    there are none. Bytes a second: `touched` by all other kernels; `frugal_touched`, the same where freed memory goes
    back to the system at once with hardly any slack, 0 where that cannot be chosen; `dequantized`, bytes in the
    computing dtype that are made of 8-bit weights, and `dequantized_from_4` of 4-bit ones, 0 where that is as fast;
    `packing`, bytes of weights that are packed, and `arranging`, bytes of weights that convolutions bring to their own
    order in each call while they are not, 0 where `convolution` has that time in it. `int8_convolution` and
    `int8_product` are operations a second with weights and inputs in int8, 0 where there are no instructions for it;
    `product_attention` with attention computed as our own models do where oneDNN multiplies, else 0. Of the bytes of
    weights in the computing dtype the share `weights_read` is read where they multiply.
    Bytes that reach the device a second: over the `link` from host memory (on a CPU: by mapping pages that are in
    memory), `converted` where the dtype changes or bytes are copied, and from the `disk`. A `kernel` takes so many
    seconds to begin.
    Files of up to `cache` bytes stay in the system's memory, so that they are read from the disk once. The process
    itself takes `base` bytes on the host and `device_base` bytes on the device before anything is loaded; `libraries`
    bytes of these are in workspaces that PyTorch allocates, and the others in the driver's context. An allocator takes
    `slack`, a share of activations, on top of them, at most `slack_most` bytes. Each second of loading beside computing
    costs computing `contention` seconds: on a CPU the reader takes processor time. `unified` marks an accelerator whose
    memory is the host's. `assumed` marks usual figures, which were not measured. Of what rests beside a GPU at most
    `pinned_most` bytes are pinned.
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
    dequantized_from_4: float = 0.0
    contention: float = 0.0
    channels_last: float = 0.0
    unified: bool = False
    assumed: bool = False
    pinned_most: int = 2**62
    libraries: int = 0
    packed_convolution: float = 0.0
    packed_product: float = 0.0
    packing: float = 1e9
    int8_convolution: float = 0.0
    int8_product: float = 0.0
    product_attention: float = 0.0
    weights_read: float = 1.0
    arranging: float = 0.0

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computes."""
        return self.device == "cpu"

    @property
    def one_memory(self) -> bool:
        """Whether the device's memory is the host's, so that one budget holds for both."""
        return self.on_cpu or self.unified

    def in_workload(self, workload: Workload) -> Rates:
        """The rates for a run: a CPU's heap keeps at most what the stages that keep a heap have in use."""
        if self.frugal is None:
            return self
        keeping = (stage for stage in workload.stages if stage.keeps_heap)
        in_use = (call.peak + stage.carried for stage in keeping for call in stage.ways.values())
        return replace(self, slack_most=min(self.slack_most, int(self.slack * max(in_use, default=0))))

    def gives_back(self, stage: Stage) -> bool:
        """Whether freed memory goes back to the system at once in a stage, as it does where keeping it does not pay."""
        return self.is_frugal or (self.frugal is not None and not stage.keeps_heap)

    def in_stage(self, stage: Stage) -> Rates:
        """The rates that hold in a stage."""
        return self.frugal or self if self.gives_back(stage) else self

    @property
    def is_frugal(self) -> bool:
        """Whether freed memory goes back to the system at once in all stages."""
        return self.frugal_touched > 0 and self.touched == self.frugal_touched

    @property
    def frugal(self) -> Rates | None:
        """The rates where freed memory goes back to the system at once, if that can be chosen."""
        if "_frugal" not in self.__dict__:  # a `cached_property` of Python 3.11 has a lock, which a fork may find held
            self.__dict__["_frugal"] = self._made_frugal()
        return self.__dict__["_frugal"]

    def _made_frugal(self) -> Rates | None:
        if not self.frugal_touched or self.is_frugal:
            return None
        return replace(self, slack=min(self.slack, HOLES), slack_most=HOLES_MOST, touched=self.frugal_touched)

    def by_onednn(self) -> Rates:
        """The rates where oneDNN multiplies in linear layers and in attention."""
        product = max(self.product, self.packed_product)
        return replace(self, product=product, attention=max(self.attention, self.product_attention))

    def with_packed(self) -> Rates:
        """The rates with packed weights; these same ones where nothing is gained."""
        return self._multiplying(self.packed_convolution, self.packed_product)

    def with_int8(self) -> Rates:
        """The rates with weights and inputs in int8; these same ones where nothing is gained."""
        faster = self._multiplying(self.int8_convolution, self.int8_product)
        return faster if faster is self else replace(faster, weights_read=0.25)

    def _multiplying(self, convolution: float, product: float) -> Rates:
        if convolution <= self.convolution and product <= self.product:
            return self
        convolution, product = max(convolution, self.convolution), max(product, self.product)
        last = max(self.channels_last, convolution) if self.channels_last else 0.0
        return replace(self, convolution=convolution, product=product, channels_last=last, arranging=0.0)

    def _convolving(self, work: Work) -> float:
        if self.arranging > 0:
            return work.convolution / self.packed_convolution + work.arranged / self.arranging
        return work.convolution / self.convolution

    def seconds(self, work: Work) -> float:
        """Seconds of computing with the weights on the device; reading them may take longer than multiplying."""
        weighted = (
            self._convolving(work)
            + work.channels_last / (self.channels_last or self.convolution)
            + work.product / self.product
        )
        return (
            max(weighted, work.weights * self.weights_read / self.touched)
            + work.attention / self.attention
            + work.touched / self.touched
            + work.kernels * self.kernel
        )


_COMPUTED = (
    "convolution",
    "channels_last",
    "product",
    "attention",
    "product_attention",
    "touched",
    "frugal_touched",
    "dequantized",
    "dequantized_from_4",
    "packed_convolution",
    "packed_product",
    "packing",
    "int8_convolution",
    "int8_product",
    "arranging",
)


def slower(rates: Rates, factor: float) -> Rates:
    """Rates with which all computing takes `factor` times as long."""
    computed = {name: getattr(rates, name) / factor for name in _COMPUTED}
    return replace(rates, **computed, kernel=rates.kernel * factor)
