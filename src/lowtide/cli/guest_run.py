"""`lowtide generate` with a pipeline of diffusers: within a budget, to pictures and videos, whichever come out."""

from __future__ import annotations

import importlib.util
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import lowtide
from lowtide.cli.device_and_dtype import resolve_device, tell_chosen_by_guest, tell_if_slow
from lowtide.cli.errors import InputError, in_one_line, tell
from lowtide.cli.fitted import FittedRun, write_timeline
from lowtide.cli.guest_request import GuestRequest, NamedCall, call_for
from lowtide.cli.pictures import prepare_folders
from lowtide.cli.plan_command import check_plot
from lowtide.cli.request import DType, model_name, seeds_in_words
from lowtide.guests.asked import hint_for, own_names
from lowtide.stages import Stages

if TYPE_CHECKING:
    import torch


def generate_guest(request: GuestRequest) -> None:
    """Load the pipeline within its budget and make what is asked for; then say what it took."""
    check_plot(request.timeline, "--timeline")
    check_loras(request)
    call = call_for(request)
    prepare_folders(list(call.paths))
    tell(_headline(request, call))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # at its import it tells of packages that are not needed
    from lowtide.memory import Meter, steady_malloc
    from lowtide.progress import ProgressBar

    steady_malloc(mmap_threshold=8 * 2**20, trim_threshold=64 * 2**20)
    device = resolve_device(request.device)
    hint = hint_for(call.signature, call.arguments)
    meter = Meter(timeline=request.timeline is not None)
    with Stages((ProgressBar(), meter)).stage("load"), in_one_line(request.class_name, hint):
        pipe, arguments = load(request, call, device)
    _run(pipe, request, call, arguments, meter)


def _run(pipe: Any, request: GuestRequest, call: NamedCall, arguments: dict[str, Any], meter: Any) -> None:
    from lowtide.cli.guest_files import write
    from lowtide.guests.results import results_of
    from lowtide.guests.within_budget import guest_of
    from lowtide.progress import ProgressBar

    guest = guest_of(pipe)
    assert guest is not None
    fitted = FittedRun(guest)
    observers = fitted.observers(gathered=True)
    with closing(observers[-1]), guest.stages.observed(*observers, meter):
        output = pipe(**arguments)
    _tell_of_the_unsafe(output)
    with guest.stages.observed(ProgressBar(), meter):
        write(results_of(output), request, call, pipe, guest.stages)
    fitted.print_report(meter)
    if request.timeline is not None:
        write_timeline(meter, fitted.plan, request.timeline)


def load(request: GuestRequest, call: NamedCall, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline within its budget, planned for the call, and the call's arguments with generators of the seeds."""
    import torch

    from lowtide.guests.checkpoint import GuestCheckpoint
    from lowtide.guests.doors import fit
    from lowtide.guests.guest_dtype import guest_dtypes, in_dtype, kind_of_guest, load_in_fastest
    from lowtide.hub import Source

    is_auto = request.dtype is DType.AUTO
    dtype = None if is_auto else getattr(torch, request.dtype.value)
    arguments = {**call.arguments, **_generators(request, call)}
    checkpoint = GuestCheckpoint.opened(Source(request.model), arguments, dtype, request.variant, request.config)
    if not is_auto:
        tell_if_slow(kind_of_guest(checkpoint), request.dtype.value, device.type)
    budget = request.budget
    if not request.loras:
        from lowtide.fitting.budgets import parse_budgets

        budgets = parse_budgets(device, budget.vram, budget.ram, budget.disk)
        chosen, dtypes, pipe = load_in_fastest(checkpoint, budgets, budget.allow, device)
        tell_chosen_by_guest(kind_of_guest(checkpoint), chosen, dtypes, device.type)
    else:
        from lowtide.guests.adapters import add_loras

        if not hasattr(checkpoint.pipeline_class, "load_lora_weights"):
            raise InputError(f"--lora: a {request.class_name} takes no LoRA.")
        chosen, *others = guest_dtypes(checkpoint, parts := checkpoint.parts(), device)
        pipe = in_dtype(checkpoint, parts, chosen).unplanned(device)
        add_loras(pipe, [(lora.file, lora.strength) for lora in request.loras])
        tell_chosen_by_guest(kind_of_guest(checkpoint), chosen, (chosen, *others), device.type)
        fit(pipe, budget.vram, budget.ram, disk=budget.disk, allow=budget.allow, device=device, **arguments)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)  # steps are shown by ours
    return pipe, arguments


def check_loras(request: GuestRequest) -> None:
    """Raise `InputError` where LoRAs are asked for that nothing here can put on."""
    if request.loras and importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs peft, which is not installed: pip install peft")


def _generators(request: GuestRequest, call: NamedCall) -> dict[str, torch.Generator | list[torch.Generator]]:
    """One for each picture or clip, on the CPU, so that its noise is the same on every device and alone."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    names = own_names("--seed", call.signature)
    return {name: generators if len(generators) > 1 else generators[0] for name in names}


def _headline(request: GuestRequest, call: NamedCall) -> str:
    steps = "" if call.steps is None else f", {call.steps} steps"
    seeds = seeds_in_words(request.seeds) if own_names("--seed", call.signature) else "no seed"
    return f"lowtide {lowtide.__version__}: {model_name(request.model)} ({request.class_name}){steps}, {seeds}"


def _tell_of_the_unsafe(output: Any) -> None:
    flagged = getattr(output, "nsfw_content_detected", None)
    if isinstance(flagged, list) and any(flagged):
        tell("The model's safety checker blacked out a picture. Another --seed may pass.")
