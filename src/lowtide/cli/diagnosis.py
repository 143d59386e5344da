"""What `lowtide doctor` finds out: this machine's parts, their rates, and advice drawn from them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import lowtide
from lowtide.machine import disk_and_link

if TYPE_CHECKING:
    import torch

    from lowtide.planning.rates import Rates

_PACKAGES = ("torch", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow")
# Optional package -> what it is for.
_OPTIONAL = {
    "hf_xet": "faster downloads from the Hugging Face Hub",
    "diffusers": "the comparisons in tests/parity and benchmarks",
    "transformers": "pipelines of diffusers, and text encoders of a script's own",
}
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16")
_FLOAT16_TOO_SLOW, AS_LONG = 2.0, 1.05
"""Times the least seconds from which on float16 is advised against, and a dtype is said to be slower."""


@dataclass(frozen=True)
class Processor:
    """The CPU: its name, the processors we may use, the features that matter, and FLOP/s of a matrix product.

    `kernels` are the instructions that fast kernels are made of, and whether it has them. `times` is how many times as
    long a typical step of a U-Net takes in each dtype as in the fastest; empty where it was not measured.
    """

    name: str
    usable: float
    features: tuple[str, ...]
    matmul: dict[str, float]
    kernels: dict[str, bool] = field(default_factory=dict[str, bool])
    times: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes and the rate of a copy within it in bytes per second."""

    total: int
    available: int
    limited_by_container: bool
    copy_rate: float


@dataclass(frozen=True)
class Gpu:
    """One accelerator: memory in bytes, link rates from and to the host's memory in bytes per second.

    `capability` is CUDA's. One that `shares_host_memory` has none of its own: its budget is the host's.
    """

    device: str
    name: str
    capability: str | None
    shares_host_memory: bool
    total: int
    free: int
    to_device: float
    to_host: float


@dataclass(frozen=True)
class Disk:
    """Where models are read from: free bytes and the rate of a sequential read in bytes per second."""

    folder: str
    free: int
    read_rate: float | None
    note: str
    hub_cache: str


@dataclass(frozen=True)
class Planning:
    """What plans are made with: the rates in the dtype to use here, and the folder that keeps them, if any."""

    dtype: str
    rates: Rates
    kept_in: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All that `lowtide doctor` finds; `--json` prints these fields."""

    lowtide: str
    python: str
    system: str
    packages: dict[str, str | None]
    optional: dict[str, str | None]
    processor: Processor
    memory: Memory
    gpus: tuple[Gpu, ...]
    disk: Disk
    planning: Planning
    advice: tuple[str, ...]


def diagnose(folder: Path, *, refresh: bool = False) -> Diagnosis:
    """Look at this machine and measure it; `folder` is where the disk is measured.

    The rates that plans are made with are measured once; with `refresh` again.
    """
    processor, gpus = _processor(refresh=refresh), _gpus()
    optional = {name: _version(name) for name in _OPTIONAL}
    return Diagnosis(
        lowtide=lowtide.__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in _PACKAGES},
        optional=optional,
        processor=processor,
        memory=_memory(),
        gpus=gpus,
        disk=_disk(folder),
        planning=_planning(gpus, refresh=refresh),
        advice=(_dtype_advice(processor, gpus), *_gpu_advice(gpus), *_install_advice(optional)),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor(*, refresh: bool) -> Processor:
    import torch

    from lowtide.machine.dtype_speeds import dtype_speeds
    from lowtide.machine.host import processor_name_and_flags, usable_cpus
    from lowtide.machine.processor_kernels import kernels
    from lowtide.planning.computing_dtype import times_as_long

    sizes = {torch.float32: 1024, torch.bfloat16: 1024, torch.float16: 256}
    rates = {str(dtype).removeprefix("torch."): disk_and_link.matmul_rate(dtype, size) for dtype, size in sizes.items()}
    name, flags = processor_name_and_flags()
    features = tuple(feature for feature in _CPU_FEATURES if feature in flags)
    times = times_as_long(dtype_speeds(refresh=refresh))
    return Processor(name, usable_cpus(), features, rates, kernels(flags), times)


def _memory() -> Memory:
    from lowtide.machine.host import host_memory

    host = host_memory()
    return Memory(host.total, host.available, host.limited, disk_and_link.memory_copy_rate())


def _gpus() -> tuple[Gpu, ...]:
    from lowtide.machine.accelerators import devices_here

    return tuple(map(_gpu, devices_here()))


def _gpu(device: torch.device) -> Gpu:
    from lowtide.machine.accelerators import accelerator

    kind = accelerator(device)
    assert kind is not None
    memory, rates = kind.memory(device), disk_and_link.link_rates(device)
    shares = kind.shares_host_memory(device)
    return Gpu(str(device), kind.name(device), kind.capability(device), shares, memory.total, memory.free, *rates)


def _disk(folder: Path) -> Disk:
    from lowtide.hub import hub_cache

    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        rate = disk_and_link.DiskRate(None, "not measured: cannot write here")
    elif free < 10**9:
        rate = disk_and_link.DiskRate(None, "not measured: less than 1 GB is free")
    else:
        rate = disk_and_link.disk_read_rate(folder)
    return Disk(str(folder.resolve()), free, rate.read, rate.note, str(hub_cache()))


def _planning(gpus: tuple[Gpu, ...], *, refresh: bool) -> Planning:
    import torch

    from lowtide.fitting.process import alone
    from lowtide.machine.figure_cache import cache_folder
    from lowtide.planning.computing_dtype import ON_CPU, Kind, ranked
    from lowtide.planning.machine_rates import machine_rates

    device, dtype = (gpus[0].device, "float16") if gpus else ("cpu", ranked(Kind.CONVOLUTIONS, ON_CPU)[0])
    rates = machine_rates(device, getattr(torch, dtype), refresh=refresh)
    base, on_device = alone(torch.device(device), getattr(torch, dtype))
    folder = cache_folder()
    taken = replace(rates, base=base, device_base=on_device)
    return Planning(dtype, taken, None if folder is None else str(folder))


def _dtype_advice(processor: Processor, gpus: tuple[Gpu, ...]) -> str:
    if gpus:
        return "On the GPU use float16 (the default there) or bfloat16: half the memory of float32, and faster."
    if not processor.times:
        return "It could not be measured which dtype is fast on this CPU: --dtype auto stays with float32."
    best = min(("float32", "bfloat16"), key=lambda name: processor.times[name])
    slower = {name: factor for name, factor in processor.times.items() if name != best and factor > AS_LONG}
    said = " and ".join(f"{name} takes {factor:.1f}× as long" for name, factor in slower.items())
    advice = f"On this CPU leave --dtype out: models compute in {best}" + (f"; {said}." if said else ".")
    slow = " Do not use float16 here: this CPU has no instructions for it."
    return advice + (slow if processor.times["float16"] > _FLOAT16_TOO_SLOW else "")


def _gpu_advice(gpus: tuple[Gpu, ...]) -> list[str]:
    if gpus or not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        return []
    text = f"There seems to be an NVIDIA GPU, but PyTorch {_version('torch')} cannot use it. "
    return [text + "Install a CUDA build and a driver to match: see pytorch.org/get-started."]


def _install_advice(optional: dict[str, str | None]) -> list[str]:
    missing = [name for name, version in optional.items() if version is None]
    return [f"For {_OPTIONAL[name]}: {sys.executable} -m pip install {name}" for name in missing]
