"""What this process takes beside weights and activations."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

import lowtide
from lowtide.fitting.meta_subject import nbytes
from lowtide.fitting.subject import Subject
from lowtide.forks import new_lock
from lowtide.machine.accelerators import accelerator
from lowtide.machine.child_process import ChildError, run_module
from lowtide.machine.figure_cache import keep, recall
from lowtide.machine.heap import trim_heap
from lowtide.machine.host import host_memory
from lowtide.machine.resident_pages import resident_bytes
from lowtide.measuring.peaks import resident_memory
from lowtide.memory.placeholder import AtRest
from lowtide.memory.store import HostRest
from lowtide.memory.weight import span
from lowtide.planning.rates import Rates
from lowtide.weights.fill import dtype_name
from lowtide.weights.slots import slots

IMPORTS = (
    "lowtide.pipelines.stable_diffusion",
    "lowtide.pipelines.cogvideox",
    "lowtide.models.tokenizer_files",
    "lowtide.fitting.fit",
)
"""What a process with a pipeline of ours has imported."""
ROOM_TO_MEASURE = 600 * 2**20
"""Bytes that the process which measures takes, with some room."""
_COMPILED = {"bfloat16": 44 * 2**20, "float16": 44 * 2**20}


_COMPILED_ELSE = 24 * 2**20


_BUFFERS, _BUFFERS_MOST = 0.02, 20 * 2**20
"""What kernels keep once they are compiled, pages of libraries among it, and their buffers, by the bytes of weights: 55
MiB after a run of Stable Diffusion in bfloat16, 46 in float32; 35 and 24 with the shipped models."""


_KEPT_BY_ONEDNN = 16 * 2**20
"""What they keep besides in float32 where oneDNN multiplies in linear layers, at most: 2 to 15 MiB were measured."""


OBJECTS, WORD = 28 * 2**20, 300
"""What a loaded pipeline takes beside weights: modules, a copy on meta; and bytes for each word of its tokenizer."""


USUAL_BASE, USUAL_BASE_BESIDE_GPU, USUAL_CONTEXT = 340 * 10**6, 1_450_000_000, 400_000_000
"""Bytes of a process that has imported what pipelines need: 330 to 337 MB on Linux, more with CUDA's libraries, and
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
    kind = accelerator(device)
    free = 0 if kind is None else kind.memory(device).free
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
    if device.type == "cpu":
        return USUAL_BASE, 0
    return USUAL_BASE_BESIDE_GPU, USUAL_CONTEXT + workspaces(device)


def workspaces(device: torch.device) -> int:
    """Bytes of what a process takes on a device that PyTorch allocates there for libraries; 0 for a CPU."""
    kind = accelerator(device)
    return 0 if kind is None else kind.workspaces(device)


def compiled(dtype: torch.dtype, weights: int) -> int:
    """Bytes that kernels of a dtype keep on a CPU once a pipeline of so many bytes of weights has run."""
    return _COMPILED.get(dtype_name(dtype), _COMPILED_ELSE) + min(_BUFFERS_MOST, int(_BUFFERS * weights))


def objects(vocabulary: int) -> int:
    """Bytes that a pipeline takes beside its weights, with a tokenizer of so many words."""
    return OBJECTS + WORD * vocabulary


def process_rates(
    rates: Rates, subject: Subject, device: torch.device, loaded: Mapping[str, nn.Module], *, by_onednn: bool = False
) -> Rates:
    """Rates with what the process takes on the host and on the device beside a subject's weights and activations.

    The subject may be on meta; `loaded` are those of its networks that this process has in memory already. `by_onednn`
    tells that oneDNN multiplies in its linear layers.
    """
    host, on_device = alone(device, subject.dtype)
    usual = host + objects(subject.vocabulary)
    weights = weights_in_memory(loaded.values())
    own = resident_memory() - weights
    if own > usual:
        gc.collect()
        trim_heap()
        own = resident_memory() - weights
    whole = nbytes(*(weight for module in subject.modules().values() for weight in module.parameters()))
    kernels = compiled(subject.dtype, whole) + _KEPT_BY_ONEDNN * by_onednn
    left = min(kernels, LATER) if (device.type, subject.dtype) in _warm else kernels
    base = _steady((device.type, subject.dtype, subject.vocabulary), max(usual + kernels, own + left))
    return replace(rates, base=base, device_base=on_device, libraries=min(workspaces(device), on_device))


def has_run(device: torch.device, dtype: torch.dtype) -> None:
    """A pipeline has run in this process: what its kernels keep is there, and need not be added any more."""
    _warm.add((device.type, dtype))


def look_again() -> None:
    """Have the next plan count what the process takes now, where it would count what it took before."""
    with _bases_lock:
        _bases.clear()


def _steady(key: tuple[str, torch.dtype, int], base: int) -> int:
    """What the process takes by itself: the figure of before, unless it clearly changed, so that plans repeat."""
    with _bases_lock:
        before = _bases.get(key)
        if before is None or abs(base - before) > CREEP:
            _bases[key] = base
        return _bases[key]


_bases: dict[tuple[str, torch.dtype, int], int] = {}
_bases_lock = new_lock()
_warm: set[tuple[str, torch.dtype]] = set()
LATER = 8 * 2**20
"""Bytes that kernels of a process in which pipelines have run may still take, for other sizes."""
CREEP = 64 * 2**20
"""Bytes by which kernels that are compiled, and what lies between two collections, change a process: no news."""


def weights_in_memory(modules: Iterable[nn.Module]) -> int:
    """Bytes of these modules' weights that are in this process's memory now.

    Pages of mapped files count where they were touched, weights at rest in host memory as well, each byte once.
    """
    tensors = (tensor for module in modules for slot in slots(module) for tensor in _held_by(slot.tensor))
    on_host = (tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.numel() > 0)
    return resident_bytes(
        (tensor.data_ptr(), tensor.data_ptr() + span(tensor.shape, tensor.stride()) * tensor.itemsize)
        for tensor in on_host
    )


def _held_by(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors whose bytes a slot keeps in memory: its own, or those that its weight rests as."""
    if hasattr(tensor, "__tensor_flatten__"):  # weights of a quantizing library
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
            yield getattr(tensor, name)
    elif not isinstance(tensor, AtRest):
        yield tensor
    elif isinstance(tensor.weight.rest, HostRest):
        yield tensor.weight.rest.flat
