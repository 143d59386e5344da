"""Whole calls of pipelines within budgets: memory as predicted and as measured, and the same result.

The allocator is held to what the plan says it reserves (`set_per_process_memory_fraction`), so that a call that took
more would run out of memory.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowtide
from gpu_networks import built
from gpu_place import Place, host_peak, lasting_peaks
from lowtide.planning.plan import BudgetError, Plan

PROMPT = "a red boat on the sea at night"


@dataclass(frozen=True)
class Case:
    """A pipeline on the host, the arguments of its call as `lowtide.fit` takes them, and the call."""

    pipe: Any
    planned: dict[str, Any]
    run: Callable[[], torch.Tensor]


def case(pipe: Any, planned: dict[str, Any], call: dict[str, Any], result: str = "images") -> Case:
    """A case whose call gives tensors, from the same noise each time."""
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        made = pipe(PROMPT, **call, output_type="pt", generator=torch.Generator().manual_seed(0))
        return torch.as_tensor(getattr(made, result)).cpu()

    return Case(pipe, planned, run)


def of_pictures(pipe: Any, side: int, steps: int) -> Case:
    size = {"height": side, "width": side}
    return case(pipe, {**size, "steps": steps, "output": "pt"}, {**size, "num_inference_steps": steps})


def tiny_clips(place: Place, scratch: Path) -> Case:
    """A CogVideoX of a few weights."""
    from tests import tiny_video

    pipe = tiny_video.pipeline(scratch).to(place.dtype)
    size, steps = {"height": 32, "width": 48}, 2
    planned = {**size, "frames": 9, "steps": steps, "output": "pt"}
    call = {**size, "num_frames": 9, "num_inference_steps": steps, "max_sequence_length": tiny_video.MAX_TOKENS}
    return case(pipe, planned, call, "frames")


def seascapes(place: Place, scratch: Path) -> Case:
    """The shipped model."""
    folder = Path(lowtide.__file__).parent / "assets" / "seascapes"
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=place.dtype)
    return of_pictures(pipe, 64 if place.tiny else 256, 2 if place.tiny else 4)


def sd15(place: Place, scratch: Path) -> Case:
    """The shapes of Stable Diffusion 1.5, weights that are in no file."""
    if place.tiny:
        from tests import tiny

        return of_pictures(tiny.pipeline(scratch).to(place.dtype), 64, 2)
    from transformers import CLIPTokenizer

    from make_sd15 import MODELS, SCHEDULER, write_tokenizer

    write_tokenizer(scratch / "tokenizer")
    words = CLIPTokenizer.from_pretrained(scratch / "tokenizer")

    def build() -> Any:
        networks: dict[str, Any] = {name: make() for name, make in MODELS.items()}
        return lowtide.StableDiffusionPipeline(
            **networks, tokenizer=words, scheduler=lowtide.PNDMScheduler.from_config(SCHEDULER), safety_checker=None,
            feature_extractor=None,
        )  # fmt: skip

    return of_pictures(built(build, torch.device("cpu"), place.dtype), 512, 4)


def tiny_guest(place: Place, scratch: Path, name: str = "ZImage") -> Case:
    """A pipeline of diffusers of a few weights."""
    from tests.guests.families import FAMILIES, run

    family = FAMILIES[name]()
    return Case(family.pipeline.to(place.dtype), family.call, lambda: run(family).cpu())


def sdxl(place: Place, scratch: Path) -> Case:
    """SDXL of diffusers, at its published shapes."""
    if place.tiny:
        return tiny_guest(place, scratch, "SDXL")
    import make_guests

    pipe = built(make_guests.MODELS["sdxl"], torch.device("cpu"), place.dtype)
    call = {"height": 1024, "width": 1024, "num_inference_steps": 4}
    return case(pipe, {**call, "prompt": PROMPT, "output_type": "pt"}, call)


CASES: dict[str, Callable[[Place, Path], Case]] = {
    "tiny clips": tiny_clips,
    "seascapes": seascapes,
    "sd15": sd15,
    "tiny guest": tiny_guest,
    "sdxl guest": sdxl,
}


def within(place: Place, name: str, share: float) -> dict[str, Any]:
    """One call with all weights on the device, one within a budget: `share` of the way from the least to the most."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made = CASES[name](place, Path(scratch))
        plain, about = with_all_there(place, made)
        plan = planned(place, made, share)
        reserved = max(stage.peak - stage.base for stage in plan.stages)
        place.tidy()
        place.kind.limit(place.device, reserved)
        with lasting_peaks(place) as peaks:
            began = time.perf_counter()
            result = made.run()
            seconds = time.perf_counter() - began
        place.kind.limit(place.device, None)
        about |= compared(plain, result) | of_stages(made.pipe)
    return about | {
        "budget": plan.budgets.vram,
        "exactness": plan.exactness,
        "predicted_allocated": max(stage.allocated for stage in plan.stages),
        "predicted_reserved": reserved,
        "peak_allocated": peaks.allocated,
        "peak_reserved": peaks.reserved,
        "predicted_seconds": plan.seconds,
        "seconds": seconds,
        "host_peak": host_peak(),
        "predicted_host_peak": plan.host_peak,
        "warnings": sorted({str(warning.message)[:200] for warning in warned}),
    }


def with_all_there(place: Place, made: Case) -> tuple[torch.Tensor, dict[str, Any]]:
    """The plain run, and what it took; the pipeline is on the host again afterwards."""
    made.pipe.to(place.device)
    place.tidy()
    plain = made.run()
    allocated, reserved = place.kind.peaks(place.device)
    began = time.perf_counter()
    made.run()
    seconds = time.perf_counter() - began
    made.pipe.to("cpu")
    return plain, {"plain_allocated": allocated, "plain_reserved": reserved, "plain_seconds": seconds}


def planned(place: Place, made: Case, share: float) -> Plan:
    """The plan for a budget between the least that serves and what the fastest plan takes; it is at work then."""

    def plan(vram: int) -> Plan:
        return lowtide.fit(made.pipe, vram=vram, device=place.device, **made.planned)

    most = plan(place.kind.memory(place.device).free)
    if share == 1:
        return most
    least = least_of(plan)
    return plan(int(least + share * (most.peak - least)))


def least_of(plan: Callable[[int], Plan]) -> int:
    """The least bytes of the device that serve, as the refusal of less says."""
    try:
        plan(1000)
    except BudgetError as error:
        return error.minimum.vram or 0
    raise AssertionError("a budget of 1,000 bytes was not refused")


def compared(plain: torch.Tensor, result: torch.Tensor) -> dict[str, Any]:
    difference = float((plain.float() - result.float()).abs().max())
    return {"equal": torch.equal(plain, result), "difference": difference, "is_finite": bool(plain.isfinite().all())}


def of_stages(pipe: Any) -> dict[str, Any]:
    """Of every stage: the peak and the seconds, predicted and measured."""
    report = lowtide.report(pipe)
    stages = {
        stage.name: [stage.predicted_peak, stage.peak, stage.predicted_seconds, stage.seconds]
        for stage in report.stages
    }
    return {"stages": stages, "degradations": list(report.degradations)}
