"""What this process takes beside weights and activations."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import lowtide
from lowtide.fitting.meta_subject import nbytes
from lowtide.machine.child_process import ChildError, run_module
from lowtide.machine.figure_cache import keep, recall
from lowtide.machine.heap import trim_heap
from lowtide.machine.host import host_memory
from lowtide.measuring.peaks import resident_memory
from lowtide.memory.attach import attachment_of
from lowtide.planning.machine_rates import machine_rates
from lowtide.planning.rates import Rates
from lowtide.weights.fill import dtype_name

IMPORTS = ("transformers", "lowtide.pipelines.stable_diffusion", "lowtide.pipelines.cogvideox", "lowtide.fitting.fit")
"""What a process with a pipeline of ours has imported."""
ROOM_TO_MEASURE = 600 * 2**20
"""Bytes that the process which measures takes, with some room."""
_COMPILED = {"bfloat16": 44 * 2**20, "float16": 44 * 2**20}


_COMPILED_ELSE = 24 * 2**20


_BUFFERS, _BUFFERS_MOST = 0.02, 20 * 2**20
"""What kernels keep once they are compiled, pages of libraries among it, and their buffers, by the bytes of weights: 55
MiB after a run of Stable Diffusion in bfloat16, 46 in float32; 35 and 24 with the shipped models."""


OBJECTS, WORD = 28 * 2**20, 300
"""What a loaded pipeline takes beside weights: modules, a twin on meta; and bytes for each word of its tokenizer."""


USUAL_BASE, USUAL_BASE_BESIDE_GPU, USUAL_CONTEXT = 380 * 10**6, 1_500_000_000, 400_000_000
"""Bytes of a process that has imported what pipelines need: 370 to 378 MB on Linux, more with CUDA's libraries, and
what CUDA's context takes on the device."""


def alone(device: torch.device, dtype: torch.dtype, imports: Sequence[str] = IMPORTS) -> tuple[int, int]:
    """Bytes that a process takes by itself, on the host and on the device (0 there for a CPU).

    Measured once in a process of its own, which imports what it is told to; usual figures where that fails, which a
    warning says.
    """
    key = [lowtide.__version__, torch.__version__, sys.version, device.type, dtype_name(dtype), *imports]
    figures = recall("process", key)
    if figures is not None and all(type(figures.get(name)) is int for name in ("host", "device")):
        return figures["host"], figures["device"]
    if device.type == "cpu" and host_memory().available < ROOM_TO_MEASURE:
        return usual_base(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    try:
        printed = run_module("lowtide.machine.own_memory", str(device), dtype_name(dtype), *imports)
    except ChildError as error:
        warnings.warn(
            f"What a process takes could not be measured, so plans assume usual figures: {error}", stacklevel=3
        )
        return usual_base(device)
    host, left = map(int, printed.split()[-2:])
    on_device = max(free - left, 0)
    keep("process", key, {"host": host, "device": on_device})
    return host, on_device


def usual_base(device: torch.device) -> tuple[int, int]:
    """What `alone` gives where nothing can be measured, such as for a device that is not here."""
    return (USUAL_BASE, 0) if device.type == "cpu" else (USUAL_BASE_BESIDE_GPU, USUAL_CONTEXT)


def compiled(dtype: torch.dtype, weights: int) -> int:
    """Bytes that kernels of a dtype keep on a CPU once a pipeline of so many bytes of weights has run."""
    return _COMPILED.get(dtype_name(dtype), _COMPILED_ELSE) + min(_BUFFERS_MOST, int(_BUFFERS * weights))


def objects(vocabulary: int) -> int:
    """Bytes that a pipeline takes beside its weights, with a tokenizer of so many words."""
    return OBJECTS + WORD * vocabulary


def rates_here(device: torch.device, pipe: Any, modules: Mapping[str, nn.Module]) -> Rates:
    """What this machine does in a second, with what the process takes for a pipeline beside weights and activations.

    `pipe` may be on meta; `modules` are those of its networks that this process has in memory already.
    """
    host, on_device = alone(device, pipe.dtype)
    rates = replace(machine_rates(device, pipe.dtype), base=host, device_base=on_device)
    weights = sum(_in_memory(module) for module in modules.values())
    vocabulary = getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "vocab_size", 0)
    usual = rates.base + objects(vocabulary)
    own = resident_memory() - weights
    if own > usual:
        gc.collect()
        trim_heap()
        own = resident_memory() - weights
    whole = nbytes(*(one for module in pipe.modules().values() for one in module.parameters()))
    steady = _steady((device.type, pipe.dtype, vocabulary), max(usual, own))
    return replace(rates, base=steady + compiled(pipe.dtype, whole))


def _steady(key: tuple[str, torch.dtype, int], base: int) -> int:
    """What the process takes by itself: the figure of before, unless it has clearly grown, so that plans repeat."""
    known = _bases.get(key)
    if known is None or base > known + CREEP:
        _bases[key] = base
    return _bases[key]


_bases: dict[tuple[str, torch.dtype, int], int] = {}


CREEP = 64 * 2**20
"""Bytes that kernels, once they are compiled, and memory between two collections add to a process: no news."""


def _in_memory(module: nn.Module) -> int:
    """Bytes of weights in this process's memory, at most: those that are not at rest, and those that stay."""
    found = {t.data_ptr(): t.numel() * t.itemsize for t in module.parameters() if type(t) is nn.Parameter and t.is_cpu}
    attachment = attachment_of(module)
    return sum(found.values()) + (0 if attachment is None else attachment.stream.ledger.in_use)
