"""The rows of the benchmark on an accelerator, in order of importance, and a process of its own for each of them."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_steps as steps
from gpu_peers import PEERS
from gpu_place import Place

SHARES = (0, 25, 50, 75)
NETWORKS = ("flux", "sdxl", "sd15")
GIGABYTES = {"flux": 24, "sdxl": 5, "sd15": 2}
LINKS = {"PCIe 4": 25e9, "PCIe 3": 12e9}
"""What x16 slots usually give pinned memory, in bytes a second."""


@dataclass(frozen=True)
class Row:
    """A measurement: `rank` orders rows, the most important first; `expected` seconds on a fast card decide on a start.

    `needs` are packages without which it is left out.
    """

    group: str
    name: str
    rank: int
    expected: float
    measure: Callable[[Place], dict[str, Any]]
    needs: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Seconds after which it is given up."""
        return 60 + 3 * self.expected

    @property
    def missing(self) -> list[str]:
        """Of what it needs, what is not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def machine(place: Place) -> dict[str, Any]:
    """What the device is, and how fast its link is in both directions."""
    from lowtide.machine.disk_and_link import link_rates

    memory = place.kind.memory(place.device)
    forth, back = (place.link_rate(),) * 2 if place.tiny else link_rates(place.device)
    about = {"name": place.kind.name(place.device), "capability": place.kind.capability(place.device)}
    return {**about, "memory": memory.total, "free": memory.free, "to_device": forth, "from_device": back}


def call(name: str, share: float, place: Place) -> dict[str, Any]:
    from gpu_calls import within

    return within(place, name, share)


def decode(side: int, place: Place) -> dict[str, Any]:
    from gpu_kernels import decodes

    return decodes(place, 32 if place.tiny else side)


def products(place: Place) -> dict[str, Any]:
    from gpu_kernels import fp8_products

    return fp8_products(place)


def rows() -> list[Row]:
    """All of them, the most important first."""
    found = [*of_steps(), *of_peers(), *of_links(), *of_another_card(), *of_calls()]
    found.append(Row("products", "fp8 products", 50, 5, products))
    for rank, (side, expected) in enumerate({2048: 8, 1024: 5, 4096: 15}.items()):
        found.append(Row("decodes", f"decode {side}", 55 + rank, expected, partial(decode, side), ("safetensors",)))
    return sorted(found, key=lambda row: row.rank)


def of_steps() -> list[Row]:
    """All weights on the device, and shares of them."""
    found = []
    for number, name in enumerate(NETWORKS):
        seconds = 5 + 0.7 * GIGABYTES[name]
        needs = () if name == "flux" else ("safetensors",)
        all_there = partial(steps.resident, name=name)
        found.append(Row("steps", f"{name} 100", number, seconds - 2, all_there, needs))
        for share in SHARES:
            rank = {0: 10, 50: 40, 25: 70, 75: 71}[share] + number
            measure = partial(steps.streamed, name=name, share=share / 100)
            found.append(Row("steps", f"{name} {share}", rank, seconds, measure, needs))
    leaf = partial(steps.streamed, name="flux", share=0, level="leaf")
    return [*found, Row("steps", "flux 0 leaf", 85, 22, leaf)]


def of_peers() -> list[Row]:
    """Other libraries on the same networks."""
    found = []
    for number, name in enumerate(NETWORKS):
        for place, (peer, about) in enumerate(PEERS.items()):
            is_main = name == "flux" and peer.startswith("diffusers ")
            needs = about.needs if name == "flux" else (*about.needs, "safetensors")
            if name == "flux" or peer in ("diffusers leaf", "diffusers block", "model offload"):
                rank = 20 + place if is_main else 60 + 3 * place + number
                measure = partial(steps.peers, name=name, peer=peer)
                found.append(Row("steps", f"{name} {peer}", rank, 5 + GIGABYTES[name], measure, needs))
    return found


def of_links() -> list[Row]:
    """The same computing beside slower links."""
    found = []
    for place, (link, rate) in enumerate(LINKS.items()):
        for number, (name, share) in enumerate({"sdxl": 50, "flux": 50}.items()):
            measure = partial(steps.streamed, name=name, share=share / 100, link=rate)
            needs = ("safetensors",) if name == "sdxl" else ()
            rank = 80 + place + number
            found.append(Row("links", f"{name} {share}, {link}", rank, 6 + GIGABYTES[name], measure, needs))
    return found


def of_another_card() -> list[Row]:
    """The network shaped as FLUX as on an L20, within 4 GiB."""
    ours = Row("L20", "L20 lowtide", 30, 45, partial(steps.as_on, how="lowtide"))
    peers = [name for name, peer in PEERS.items() if peer.streams]
    return [ours] + [
        Row("L20", f"L20 {name}", 31 + 20 * (place > 1), 60, partial(steps.as_on, how=name), PEERS[name].needs)
        for place, name in enumerate(peers)
    ]


def of_calls() -> list[Row]:
    """Whole calls within budgets."""
    from_hub = ("transformers", "tokenizers", "sentencepiece", "safetensors", "PIL")
    cases = {"seascapes": 12, "sd15": 20, "tiny clips": 12, "tiny guest": 12, "sdxl guest": 45}
    found = []
    for number, (name, seconds) in enumerate(cases.items()):
        needs = (*from_hub, *(("diffusers",) if "guest" in name else ()))
        for share in (0, 40, 100):
            rank = {0: 25, 40: 45, 100: 75}[share] + number
            measure = partial(call, name, share / 100)
            found.append(Row("calls", f"call {name} {share}", rank, seconds, measure, needs))
    return found


# ---- processes


def preload(*, tiny: bool) -> None:
    """Import what rows need, so that forked processes have it: none of it begins CUDA. Rows say what is missing."""
    ours = ("lowtide.models.unet", "lowtide.pipelines.stable_diffusion", "gpu_kernels", "gpu_calls")
    for name in (*ours, *(("tests.sim_tensor",) if tiny else ("diffusers.hooks",))):
        with suppress(ImportError):
            importlib.import_module(name)


def run(row: Row, device: str, limit: float, log: Path, *, tiny: bool, method: str) -> dict[str, Any]:
    """A row in a process of its own: its result, or `error`; always `seconds`. What it prints goes to `log`."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, row.name, device, str(log), tiny))
    began = time.perf_counter()
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(limit) else {"error": f"no result within {limit:.0f} s"}
    except EOFError:
        process.join()
        answer = {"error": f"the process ended with {process.exitcode} and no result"}
    process.join(10 if "result" in answer else 0)  # what gave no result gets no more of the others' time
    if process.is_alive():
        process.kill()
        process.join()
    return {**answer, "seconds": time.perf_counter() - began}


def child(pipe: Any, name: str, device: str, log: str, tiny: bool) -> None:
    """In that process: measure, and send what came of it."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    row = next(row for row in (Row("machine", "machine", 0, 20, machine), *rows()) if row.name == name)
    try:
        pipe.send({"result": here(row, device, tiny=tiny)})
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        last = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        pipe.send({"error": last[:400]})


def here(row: Row, device: str, *, tiny: bool) -> dict[str, Any]:
    """A row in this process; where it is `tiny`, on the stand-in of the tests."""
    import torch

    if not tiny:
        return row.measure(Place.of(device))
    from tests.sim_tensor import simulated

    torch.set_num_threads(1)
    with simulated():
        return row.measure(Place.of(device, tiny=True))
