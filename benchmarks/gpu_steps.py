"""Steps of a network whose weights are streamed: their time beside what computing and the link alone would take."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpu_networks import TINY, TRUE, built
from gpu_peers import PEERS
from gpu_place import Operators, Pinned, Place, host_peak, pinning
from gpu_slower import ratio_for, repeat_products, slower_link
from lowtide.memory.attach import Attachment
from lowtide.memory.blocks import blocks_of
from lowtide.memory.presets import apply_residency

STEPS, WARM = 12, 3
ROOM = 1.3
"""Of a network's bytes: what a device has free where the network is built there."""


@dataclass(frozen=True)
class Card:
    """What another card gives: seconds of a step with all weights there, bytes a second of the link, bytes of memory.

    The figures are assumptions, told with every result.
    """

    step: float
    link: float
    memory: int
    steps: int


L20 = Card(step=23.4 / 28, link=25e9, memory=4 * 2**30, steps=28)
"""23.4 s were published for FLUX.1-dev with all weights on an L20 (1024x1024; 28 steps assumed), beside 41 s within
4 GiB; 25 GB/s is what PCIe 4.0 x16 usually gives pinned memory."""


@dataclass
class Held:
    """A network on its way to be measured, and what was seen before it was offloaded."""

    module: nn.Module
    weights: int
    inputs: dict[str, Any]
    rate: float

    def call(self) -> Any:
        """One step."""
        with torch.no_grad():
            return self.module(**self.inputs)


def network(place: Place, name: str, *, on_host: bool = False, theirs: bool = False) -> Held:
    """A network with random weights: on the device where it has room, else on the host; of diffusers with `theirs`."""
    kept = (TINY if place.tiny else TRUE)[name]
    build = kept.theirs if theirs and kept.theirs is not None else kept.build
    with torch.device("meta"):
        weights = nbytes(build()) * place.dtype.itemsize // torch.get_default_dtype().itemsize
    has_room = place.kind.memory(place.device).free > ROOM * weights
    where = place.device if has_room and not on_host else torch.device("cpu")
    module = built(build, where, place.dtype)
    return Held(module, nbytes(module), kept.inputs(place.device, place.dtype), place.link_rate())


def nbytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.itemsize for weight in module.parameters())


# ---- rows


def resident(place: Place, name: str) -> dict[str, Any]:
    """All weights on the device."""
    held = network(place, name)
    held.module.to(place.device)
    return measured(place, held)


def streamed(place: Place, name: str, share: float, *, level: str = "block", link: float = 0) -> dict[str, Any]:
    """A share of the weights stays on the device; the others come unit by unit. `link` limits its bytes a second."""
    held = network(place, name)
    return under_rule(place, held, int(share * held.weights), level, link)


def under_rule(place: Place, held: Held, residents: int, level: str = "block", link: float = 0) -> dict[str, Any]:
    with pinning(place.kind) as pinned:
        began = time.perf_counter()
        attachment = apply_residency(held.module, residents, level=level, device=place.device)
        seconds = time.perf_counter() - began
    ratio = slowing(place, held.rate, link)
    about = measured(place, held, attachment, slower_link(place.device, ratio))
    about |= about_pins(pinned) | {"set_up": seconds, "resident": residents, "link_ratio": ratio}
    return about | {"link_rate": held.rate / ratio}


def peers(place: Place, name: str, peer: str) -> dict[str, Any]:
    """Offloaded by another library."""
    held = network(place, name, on_host=True, theirs=PEERS[peer].copies_lists)
    return under_peer(place, held, peer)


def under_peer(place: Place, held: Held, peer: str, link: float = 0) -> dict[str, Any]:
    device = place.device
    if place.tiny:  # no other library knows the stand-in
        device, held.inputs = torch.device("cpu"), on_cpu(held.inputs)
    began = time.perf_counter()
    PEERS[peer].put(held.module, device)
    seconds = time.perf_counter() - began
    ratio = slowing(place, held.rate, link)
    about = measured(place, held, slower=slower_link(device, ratio))
    moved = held.weights if PEERS[peer].streams else 0
    return about | {"set_up": seconds, "streamed": moved, "link_ratio": ratio, "link_rate": held.rate / ratio}


def on_cpu(given: Any) -> Any:
    """A tensor, or those in a dict, on the CPU."""
    return given.cpu() if isinstance(given, torch.Tensor) else {name: on_cpu(part) for name, part in given.items()}


def as_on(place: Place, how: str, card: Card = L20) -> dict[str, Any]:
    """The network shaped as FLUX with a step and a link as slow as another card's, by a rule of ours or by a peer.

    Ours keeps as many weights on the device as the card's memory holds beside activations and two blocks.
    """
    held = network(place, "flux")
    held.module.to(place.device)
    ratio, seconds = slowed_to(place, held, card)
    beside = place.kind.peaks(place.device)[0] - held.weights
    if how == "lowtide":
        least = 2 * max(nbytes(block) for blocks in blocks_of(held.module) for block in blocks)
        room = held.weights // 3 if place.tiny else max(0, card.memory - beside - least)
        about = under_rule(place, held, room, link=card.link)
    else:
        held.module.to("cpu")
        about = under_peer(place, held, how, card.link)
    told = {"resident_step": seconds, "products_ratio": ratio, "run_of_steps": card.steps, "assumed": vars(card)}
    return about | told | {"run": about["first"] + (card.steps - 1) * about["step"]}


def slowed_to(place: Place, held: Held, card: Card) -> tuple[float, float]:
    """Have linear layers compute as often as a step takes that long; how often, and how long a step takes then."""

    def measure(ratio: float) -> float:
        repeat_products(held.module, ratio)
        return place.seconds(held.call, 1 if place.tiny else 3)

    place.tidy()
    ratio = ratio_for(card.step, measure, most=3.0 if place.tiny else 100.0)
    return ratio, measure(ratio)


def slowing(place: Place, rate: float, link: float) -> float:
    """How often copies are made for the link to be that slow; 1 where it is, or where nothing is asked for."""
    if not link:
        return 1.0
    return min(max(1.0, rate / link), 3.0 if place.tiny else 100.0)


# ---- what is measured


def measured(
    place: Place,
    held: Held,
    attachment: Attachment | None = None,
    slower: AbstractContextManager[None] | None = None,
) -> dict[str, Any]:
    """Seconds of steps on the device's clock and on the host's, and the peaks of memory."""
    place.tidy()
    ledger = None if attachment is None else attachment.stream.ledger
    with slower or nullcontext():
        first = place.waited(held.call)
        for _ in range(0 if place.tiny else WARM):
            held.call()
        warm = peaks_and_begin(place)
        if ledger is not None:
            ledger.reset()
        times = place.series(held.call, 1 if place.tiny else STEPS)
        later = place.kind.peaks(place.device)
        moved = 0 if ledger is None else ledger.moved // len(times)
        host = place.enqueued(held.call, 1 if place.tiny else 3)
    with Operators() as counting:
        made = held.call()
    found = {
        "step": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "first": first,
        "enqueue": host,
        "operators": counting.count,
        "streamed": moved,
        "link_rate": held.rate,
        "weights": held.weights,
        "peak_allocated": max(warm[0], later[0]),
        "peak_reserved": max(warm[1], later[1]),
        "reserved_more_in_steps": later[1] - warm[2],
        "host_peak": host_peak(),
        "is_finite": bool((made if isinstance(made, torch.Tensor) else made.sample).isfinite().all()),
    }
    if attachment is not None and ledger is not None:
        found |= {"weights_peak": ledger.peak, "weights_bound": attachment.bound, "units": len(attachment.units)}
    return found


def peaks_and_begin(place: Place) -> tuple[int, int, int]:
    """Both peaks until now, and what the allocator holds now."""
    allocated, reserved = place.kind.peaks(place.device)
    place.kind.synchronize(place.device)
    place.kind.begin_peaks(place.device)
    return allocated, reserved, place.kind.peaks(place.device)[1]


def about_pins(pinned: Pinned) -> dict[str, Any]:
    return {"pinned": pinned.nbytes, "pinning": pinned.seconds, "pins_failed": pinned.failed}
