"""The process of one run: reads a `Spec` as JSON from stdin, makes pictures, and prints a `Reading` as JSON.

`lowtide.bench.children` starts it. Apart from the spec's technique it sets nothing in either library: no number of
threads, no backend, and no allocator (`lowtide generate` calls `steady_malloc`; this does not).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lowtide.bench.children import ANSWER
from lowtide.bench.context import Context
from lowtide.bench.runs import Reading, Spec
from lowtide.bench.techniques import TECHNIQUES

if TYPE_CHECKING:
    import torch

GUIDANCE = 7.5
WARM_UP_STEPS = 2


def main() -> None:
    """Run the spec on stdin; the last line on stdout is the reading, or the reason why there is none."""
    spec = Spec(**json.loads(sys.stdin.read()))
    try:
        answer: dict[str, Any] = {"reading": asdict(measured(spec))}
    except Exception as error:  # any failure of a technique is a result: the table shows it
        answer = {"failure": f"{type(error).__name__}: {str(error).strip()}"}
    print(f"\n{json.dumps({ANSWER: answer})}", flush=True)


def measured(spec: Spec) -> Reading:
    """Load, apply the technique, call once to warm up, then time one call of the whole pipeline."""
    import torch

    from lowtide.machine.accelerators import accelerator
    from lowtide.measuring.peaks import process_peak

    device, kind = torch.device(spec.device), accelerator(spec.device)
    library = importlib.import_module(spec.library)
    began = time.perf_counter()
    pipe = loaded(library, spec, getattr(torch, spec.dtype))
    load = time.perf_counter()
    TECHNIQUES[spec.technique].apply(pipe, library, context_of(spec, device, getattr(torch, spec.dtype)))
    _finish(device)
    applied = time.perf_counter()
    pictures(pipe, spec, WARM_UP_STEPS)
    latency, images, allocated, reserved = _timed(pipe, spec, device)
    return Reading(
        load=load - began,
        apply=applied - load,
        latency=latency,
        peak_rss=process_peak(),
        device_allocated=allocated,
        device_reserved=reserved,
        checksum=hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest(),
        gpu=None if kind is None else kind.name(device),
        versions=versions(library),
    )


def loaded(library: ModuleType, spec: Spec, dtype: torch.dtype) -> Any:
    """The library's pipeline, with DDIM as its scheduler."""
    pipe = library.StableDiffusionPipeline.from_pretrained(spec.model, torch_dtype=dtype, variant=spec.variant)
    pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def context_of(spec: Spec, device: torch.device, dtype: torch.dtype) -> Context:
    """What the technique is told about the run."""
    return Context(device, dtype, spec.width, spec.height, spec.batch, spec.folder)


def pictures(pipe: Any, spec: Spec, steps: int) -> list[Any]:
    """Call the whole pipeline once; the noise is drawn on the CPU, so it is the same on every device."""
    import torch

    return pipe(
        [spec.prompt] * spec.batch,
        height=spec.height,
        width=spec.width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(spec.seed),
    ).images


def versions(library: ModuleType) -> dict[str, str]:
    """The versions of Python, of PyTorch, of transformers where it is installed, and of the library, by name."""
    there = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is not None]
    packages = {name: importlib.metadata.version(name) for name in there}
    return {"python": platform.python_version(), **packages, library.__name__: library.__version__}


def _timed(pipe: Any, spec: Spec, device: torch.device) -> tuple[float, list[Any], int | None, int | None]:
    """Seconds of one call, its pictures, and the device allocator's peaks of allocated and of reserved bytes."""
    from lowtide.machine.accelerators import accelerator

    kind = accelerator(device)
    _finish(device)
    if kind is not None:
        kind.begin_peaks(device)
    began = time.perf_counter()
    images = pictures(pipe, spec, spec.steps)
    _finish(device)
    latency = time.perf_counter() - began
    allocated, reserved = (None, None) if kind is None else kind.peaks(device)
    return latency, images, allocated, reserved


def _finish(device: torch.device) -> None:
    """Wait for the device, so that its work is in the time measured."""
    from lowtide.machine.accelerators import accelerator

    kind = accelerator(device)
    if kind is not None:
        kind.synchronize(device)


if __name__ == "__main__":
    main()
