"""How fast this machine computes, reads and copies: measured once, then kept in a file in the user's cache folder."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

import lowtide
from lowtide.machine.accelerators import accelerator
from lowtide.machine.announce import announce
from lowtide.machine.child_process import ChildError, run_module
from lowtide.machine.device_names import KINDS
from lowtide.machine.disk_and_link import DiskRate, disk_read_rate, link_rates
from lowtide.machine.figure_cache import keep, recall
from lowtide.machine.host import host_memory, processor_name_and_flags, usable_cpus
from lowtide.machine.kernel_rates import Computing
from lowtide.machine.pinned_memory import PINNED, most_pinned
from lowtide.machine.processor_share import Share, Watch, is_busy
from lowtide.planning.rates import Rates, slower
from lowtide.weights.fill import dtype_name

_FORMAT = 16
USUAL_DISK = 5e8
"""Bytes a second, assumed where the disk cannot be measured."""
_USUAL_MAPPED, _USUAL_AGAIN = 2e9, 3e9

SLACK_ON_CPU = 72 * 2**20
"""Bytes that glibc's heap keeps at most beside those in use, with the ends of large pages: in a U-Net up to 64 MiB were
measured."""
REACHED = 0.85
"""Share of its rate alone that a kernel reaches inside a network: 0.6 to 1.2 in runs of three pipelines."""
MODULE = 6e-5
"""Seconds that Python takes from one kernel to the next inside a network, besides the start of the kernel itself."""
USUAL_RENEWING = 2e-10
"""Extra seconds for each byte touched where the system makes its page anew each time; 1.3e-10 on an AMD EPYC."""

ROOM_TO_MEASURE = 1200 * 2**20
"""Bytes that the processes that measure a CPU take together, with a margin."""

_MEASURED_IN = 120.0
"""Seconds that measuring may take; it takes less than five on an idle machine."""
_MARKS = {"others": 0.0, "load": 0.0, "busy": False}
"""What is kept beside rates: how many processors others took meanwhile, the load average, and whether that was much."""


def machine_rates(
    device: torch.device | str, dtype: torch.dtype, folder: Path | None = None, *, refresh: bool = False
) -> Rates:
    """The rates of a device in a dtype; `base` and `device_base` are 0. The disk is measured in `folder`, the models'.

    The first call, and any with `refresh`, measures for a few seconds, and says so. Later calls read the rates from the
    user's cache folder, except for `cache` and `pinned_most`, which are always what this system's memory could hold
    now. Those measured while others were at work are measured again once these are done. If there is no room for the
    process that measures, or if it fails, usual figures are assumed and the next call tries again; of a failure a
    warning gives the reason.
    """
    device = torch.device(device)
    folder = folder or _usual_folder()
    key = _key(device, dtype, folder)
    rates, was_busy = (None, False) if refresh else _kept(key)
    if rates is not None and was_busy and not is_busy(torch.get_num_threads()):
        rates = None
    if rates is None and device.type == "cpu" and host_memory().available < ROOM_TO_MEASURE:
        return _usual_on_cpu()
    if rates is None:
        announce(f"Measuring how fast this machine is in {dtype_name(dtype)}: once, for a few seconds.")
        try:
            rates, share = _measured_elsewhere(device, dtype, folder)
        except ChildError as error:
            warnings.warn(f"This machine could not be measured, so plans assume usual figures: {error}", stacklevel=3)
            return _usual_on_cpu() if device.type == "cpu" else assumed_rates(dtype_name(dtype))
        busy = share.was_busy(torch.get_num_threads())
        if busy:
            announce(f"Others were at work (load {share.load:.1f}): it is measured again once they are done.")
        keep("rates", key, {**asdict(rates), **asdict(share), "busy": busy})
    return replace(rates, cache=host_memory().available, pinned_most=most_pinned(device))


def correct_rates(device: torch.device, dtype: torch.dtype, factor: float, folder: Path | None = None) -> None:
    """Have all computing take `factor` times as long as the rates that are kept say; nothing where none are.

    They are trusted from then on, whoever was at work while they were measured: a run has told better.
    """
    key = _key(device, dtype, folder or _usual_folder())
    rates, _ = _kept(key)
    if rates is not None:
        keep("rates", key, {**asdict(slower(rates, factor)), **_MARKS})


def _kept(key: list[Any]) -> tuple[Rates | None, bool]:
    """The rates that were kept, if they were, and whether others were at work when they were measured."""
    figures = dict(recall("rates", key) or {})
    marks = {name: figures.pop(name, usual) for name, usual in _MARKS.items()}
    return (Rates(**figures), bool(marks["busy"])) if _is_complete(figures) else (None, False)


def _usual_on_cpu() -> Rates:
    """Usual figures of a laptop's or a small server's CPU."""
    speed = 4e10 * torch.get_num_threads()
    return Rates(
        device="cpu",
        convolution=speed,
        product=speed,
        attention=0.7 * speed,
        touched=5e9,
        kernel=MODULE,
        link=_USUAL_MAPPED,
        converted=_USUAL_AGAIN,
        disk=USUAL_DISK,
        cache=host_memory().available,
        base=0,
        slack=1.0,
        slack_most=SLACK_ON_CPU,
        frugal_touched=1 / (1 / 5e9 + USUAL_RENEWING),
        dequantized=8e9,
        contention=_contention(),
        channels_last=speed,
        assumed=True,
        pinned_most=0,
    )


def assumed_rates(dtype: str = "float16") -> Rates:
    """Usual figures of a consumer GPU (8 to 24 GB, PCIe 4) and its host, for plans for a GPU that is not here.

    About half of what data sheets of such cards promise: 40 TFLOP/s of half-precision products, 400 GB/s of memory.
    """
    speed = 2.0e13 if dtype in ("float16", "bfloat16") else 0.8e13
    return Rates(
        device="cuda",
        convolution=speed,
        product=1.2 * speed,
        attention=speed,
        touched=2.5e11,
        kernel=8e-6,
        link=1.2e10,
        converted=3e9,
        disk=2e9,
        cache=host_memory().available,
        base=0,
        slack=0.1,
        dequantized=1.5e11,
        channels_last=speed,
        assumed=True,
        pinned_most=PINNED.limit,
    )


def measured_rates(device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
    """Measure the rates now, in this process."""
    disk, computing, kind = _disk(folder), Computing(device, dtype), accelerator(device)
    on_cpu = device.type == "cpu"
    rates = Rates(  # in this order: what a process computes first takes longer, which convolutions are warmed up for
        device=device.type,
        convolution=REACHED * computing.convolution(),
        product=REACHED * computing.product(),
        attention=REACHED * computing.attention(),
        product_attention=REACHED * computing.product_attention(),
        touched=REACHED * computing.touched(),
        kernel=computing.kernel() + MODULE,
        link=(disk.mapped or _USUAL_MAPPED) if on_cpu else link_rates(device)[0],
        converted=disk.again or _USUAL_AGAIN,
        disk=disk.read or USUAL_DISK,
        cache=host_memory().available,
        base=0,
        slack=1.0 if on_cpu else 0.1,
        slack_most=SLACK_ON_CPU if on_cpu else 2**62,
        dequantized=computing.dequantized(),
        dequantized_from_4=computing.dequantized_from_4(),
        contention=_contention() if on_cpu else 0.0,
        channels_last=REACHED * computing.channels_last(),
        unified=kind is not None and kind.shares_host_memory(device),
        packed_convolution=REACHED * computing.packed_convolution(),
        packed_product=REACHED * computing.packed_product(),
        packing=computing.packing(),
        arranging=computing.arranging(),
        int8_convolution=REACHED * computing.int8_convolution(),
        int8_product=REACHED * computing.int8_product(),
    )
    return replace(rates, frugal_touched=1 / (1 / rates.touched + computing.renewing())) if on_cpu else rates


def _measured_elsewhere(device: torch.device, dtype: torch.dtype, folder: Path) -> tuple[Rates, Share]:
    """Measure in a child process, so that what measuring leaves in memory does not stay in this one."""
    arguments = (str(device), dtype_name(dtype), str(folder), str(torch.get_num_threads()))
    rates, share = json.loads(run_module(__name__, *arguments, seconds=_MEASURED_IN).splitlines()[-1])
    return Rates(**rates), Share(**share)


def _contention() -> float:
    """The share of computing that a reader takes: one processor, if every processor has a computing thread."""
    cpus = usable_cpus()
    return 1 / cpus if torch.get_num_threads() >= cpus else 0.0


def _usual_folder() -> Path:
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    return hub if hub.is_dir() and os.access(hub, os.W_OK) else Path(tempfile.gettempdir())


def _disk(folder: Path) -> DiskRate:
    for candidate in (folder, Path(tempfile.gettempdir())):
        with suppress(OSError):
            return disk_read_rate(candidate, seconds=0.5)
    warnings.warn(f"The disk cannot be measured in {folder}: plans assume {USUAL_DISK / 1e9:.1f} GB/s.", stacklevel=4)
    return DiskRate(None)


def _key(device: torch.device, dtype: torch.dtype, folder: Path) -> list[Any]:
    kind = accelerator(device)
    name = processor_name_and_flags()[0] if kind is None else kind.name(device)
    disk = os.stat(folder).st_dev if folder.is_dir() else None
    numbers = (usable_cpus(), torch.get_num_threads(), disk)
    return [_FORMAT, lowtide.__version__, torch.__version__, device.type, name, str(dtype), *numbers]


def _is_complete(rates: Mapping[str, Any]) -> bool:
    """Whether figures from a file are all there, and are rates that can be computed with."""
    if set(rates) != {field.name for field in fields(Rates)} or rates["device"] not in ("cpu", *KINDS):
        return False
    positive = (
        "convolution",
        "product",
        "attention",
        "touched",
        "kernel",
        "link",
        "converted",
        "disk",
        "dequantized",
        "channels_last",
    )
    numbers = [value for name, value in rates.items() if name not in ("device", "unified", "assumed")]
    are_numbers = all(isinstance(number, int | float) and 0 <= number < float("inf") for number in numbers)
    return are_numbers and all(rates[name] > 0 for name in positive)


def _main(device: str, dtype: str, folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    watch = Watch()
    rates = measured_rates(torch.device(device), getattr(torch, dtype), Path(folder))
    print(json.dumps([asdict(rates), asdict(watch.share())]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
