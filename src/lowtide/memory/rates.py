"""What this machine does in a second: measured once, then kept in a file in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
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
from lowtide.memory.costs import Rates
from lowtide.memory.host import host_memory, processor_name_and_flags, usable_cpus
from lowtide.memory.pace_probes import Computing
from lowtide.memory.probes import DiskRate, disk_read_rate, link_rates
from lowtide.weights.fill import dtype_name

_FORMAT = 10
USUAL_DISK = 5e8
"""Bytes a second, where no folder can be written to."""
_USUAL_MAPPED, _USUAL_AGAIN = 2e9, 3e9

SLACK_ON_CPU = 48 * 2**20
"""What glibc's heap keeps at most beside the bytes in use; measured were up to 37 MiB, in a U-Net."""
_COMPILED = {"bfloat16": 44 * 2**20, "float16": 44 * 2**20}
_COMPILED_ELSE = 24 * 2**20
_BUFFERS, _BUFFERS_MOST = 0.02, 20 * 2**20
"""What kernels keep once they are compiled, pages of libraries among it, and their buffers, by the bytes of weights: 55
MiB after a run of Stable Diffusion in bfloat16, 46 in float32; 35 and 24 with the shipped models."""
OBJECTS, WORD = 28 * 2**20, 300
"""What a loaded pipeline takes beside weights: modules, a twin on meta; and bytes for each word of its tokenizer."""
REACHED = 0.85
"""Of the rates that kernels reach alone, what they reach in a network: 0.6 to 1.2 in runs of three pipelines."""
MODULE = 6e-5
"""Seconds that Python takes from one kernel to the next inside a network, beside the kernel's own beginning."""
USUAL_RENEWING = 2e-10
"""Seconds that every byte touched takes longer where its page is made anew each time: 1.3e-10 on an AMD EPYC."""

ROOM_TO_MEASURE = 1200 * 2**20
"""Bytes that the processes which measure a CPU take together, with some room."""
USUAL_BASE = 380 * 10**6
"""Bytes of a process that has imported what pipelines need: 370 to 378 MB on Linux."""

_ALONE = """
import sys
from lowtide.memory.meter import steady_malloc
steady_malloc()
import psutil, torch
import torch.nn.functional as F
from transformers import CLIPTextModel, T5EncoderModel
from lowtide import CogVideoXPipeline, StableDiffusionPipeline
from lowtide.memory.host import trim_heap
from lowtide.memory.profile import trace_call
device, dtype = torch.device(sys.argv[1]), getattr(torch, sys.argv[2])
x = torch.ones(1, 32, 16, 16, device=device, dtype=dtype)
with torch.no_grad():
    F.conv2d(x, torch.ones(32, 32, 3, 3, device=device, dtype=dtype), padding=1)
    F.linear(x[0, 0], x[0, 1])
    F.scaled_dot_product_attention(x, x, x)
    on_meta = x.to("meta")
    trace_call(lambda: F.group_norm(on_meta, 4) + F.interpolate(on_meta, scale_factor=2).mean(), [on_meta])
free = 0
if device.type == "cuda":
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
trim_heap()
print(psutil.Process().memory_info().rss, free)
"""
"""What a process takes by itself, once it has imported what pipelines need, planned and computed a little."""


_ELSEWHERE = """
import dataclasses, json, sys
from pathlib import Path
import torch
from lowtide.memory.rates import measured_rates
device, dtype, folder = torch.device(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
print(json.dumps(dataclasses.asdict(measured_rates(device, dtype, folder))))
"""


def machine_rates(
    device: torch.device | str, dtype: torch.dtype, folder: Path | None = None, *, refresh: bool = False
) -> Rates:
    """The rates of a device in a dtype; `folder` is where the disk is measured: that of the models.

    Measured in a few seconds the first time, or to `refresh`, and then read from `cache_folder`; but `cache` is always
    what the system's memory could hold now. Where there is no room for the processes that measure a CPU, usual figures
    are assumed, and measured another time.
    """
    on = torch.device(device)
    place = folder or _usual_folder()
    key = _key(on, dtype, place)
    file = cache_folder() / f"rates-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    known = None if refresh else _read(file, key)
    if known is None and on.type == "cpu" and host_memory().available < ROOM_TO_MEASURE:
        return _usual_on_cpu()
    if known is None:
        known = _measured_elsewhere(on, dtype, place)
        _write(file, key, known)
    return replace(known, cache=host_memory().available)


def cache_folder() -> Path:
    """Where figures are kept: `lowtide` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(asked) if asked else Path("~/.cache").expanduser()) / "lowtide"


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
        base=USUAL_BASE,
        slack=1.0,
        slack_most=SLACK_ON_CPU,
        frugal_touched=1 / (1 / 5e9 + USUAL_RENEWING),
        dequantized=8e9,
        contention=_contention(),
        channels_last=speed,
        assumed=True,
    )


def assumed_rates(dtype: str = "float16") -> Rates:
    """Usual figures of a consumer GPU (8 to 24 GB, PCIe 4) and its host, for a GPU that is not here.

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
        base=1_500_000_000,
        device_base=400_000_000,
        slack=0.1,
        dequantized=1.5e11,
        channels_last=speed,
        assumed=True,
    )


def measured_rates(device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
    """Measure now."""
    base, device_base = alone(device, dtype)
    disk, computing = _disk(folder), Computing(device, dtype)
    on_cpu, touched = device.type == "cpu", REACHED * computing.touched()
    found = Rates(
        device=device.type,
        convolution=REACHED * computing.convolution(),
        product=REACHED * computing.product(),
        attention=REACHED * computing.attention(),
        touched=touched,
        kernel=computing.kernel() + MODULE,
        link=(disk.mapped or _USUAL_MAPPED) if on_cpu else link_rates(device.index or 0)[0],
        converted=disk.again or _USUAL_AGAIN,
        disk=disk.read or USUAL_DISK,
        cache=host_memory().available,
        base=base,
        device_base=device_base,
        slack=1.0 if on_cpu else 0.1,
        slack_most=SLACK_ON_CPU if on_cpu else 2**62,
        dequantized=computing.dequantized(),
        contention=_contention() if on_cpu else 0.0,
        channels_last=REACHED * computing.channels_last(),
    )
    return replace(found, frugal_touched=1 / (1 / touched + computing.renewing())) if on_cpu else found


def _measured_elsewhere(device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
    """Measure in a process of its own: what that leaves in memory would stay in this one."""
    name = dtype_name(dtype)
    done = _in_a_process(_ELSEWHERE, str(device), name, str(folder), str(torch.get_num_threads()))
    return Rates(**json.loads(done.splitlines()[-1]))


def _in_a_process(code: str, *arguments: str) -> str:
    """What `code` prints when it runs by itself, with this very package."""
    path = os.pathsep.join([str(Path(lowtide.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def alone(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a process takes by itself, on the host and on the device; 0 there for a CPU."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    printed = _in_a_process(_ALONE, str(device), dtype_name(dtype))
    host, left = map(int, printed.split()[-2:])
    return host, max(free - left, 0)


def compiled(dtype: torch.dtype, weights: int) -> int:
    """Bytes that kernels of a dtype keep on a CPU once a pipeline of so many bytes of weights has run."""
    return _COMPILED.get(dtype_name(dtype), _COMPILED_ELSE) + min(_BUFFERS_MOST, int(_BUFFERS * weights))


def objects(vocabulary: int) -> int:
    """Bytes that a pipeline takes beside its weights, with a tokenizer of so many words."""
    return OBJECTS + WORD * vocabulary


def _contention() -> float:
    """A reader beside as many computing threads as there are processors takes its share of them."""
    cpus = usable_cpus()
    return 1 / cpus if torch.get_num_threads() >= cpus else 0.0


def _usual_folder() -> Path:
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    return hub if hub.is_dir() and os.access(hub, os.W_OK) else Path(tempfile.gettempdir())


def _disk(folder: Path) -> DiskRate:
    for place in (folder, Path(tempfile.gettempdir())):
        with suppress(OSError):
            return disk_read_rate(place, seconds=0.5)
    warnings.warn(f"The disk cannot be measured in {folder}: plans assume {USUAL_DISK / 1e9:.1f} GB/s.", stacklevel=4)
    return DiskRate(None)


# ---- the file


def _key(device: torch.device, dtype: torch.dtype, folder: Path) -> list[Any]:
    on_cpu = device.type == "cpu"
    name = processor_name_and_flags()[0] if on_cpu else torch.cuda.get_device_name(device)
    disk = os.stat(folder).st_dev if folder.is_dir() else None
    numbers = (usable_cpus(), torch.get_num_threads(), disk)
    return [_FORMAT, lowtide.__version__, torch.__version__, device.type, name, str(dtype), *numbers]


def _read(file: Path, key: list[Any]) -> Rates | None:
    """What was written for `key`, or None for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, Mapping) or content.get("key") != key:
        return None
    rates = content.get("rates")
    return Rates(**rates) if isinstance(rates, Mapping) and _is_whole(rates) else None


def _is_whole(rates: Mapping[str, Any]) -> bool:
    """Whether these are rates that can be computed with."""
    if set(rates) != {field.name for field in fields(Rates)} or rates["device"] not in ("cpu", "cuda"):
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
    numbers = [value for name, value in rates.items() if name not in ("device", "assumed")]
    are_numbers = all(isinstance(one, int | float) and 0 <= one < float("inf") for one in numbers)
    return are_numbers and all(rates[name] > 0 for name in positive)


def _write(file: Path, key: list[Any], rates: Rates) -> None:
    """Keep the figures; where that is not possible they are measured again next time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as handle:
            handle.write(json.dumps({"key": key, "rates": asdict(rates)}, indent=2))
        Path(handle.name).replace(file)
