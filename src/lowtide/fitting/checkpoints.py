"""Plan for a checkpoint before a byte of its weights is read, and load it within the plan."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.fitting.apply import check_not_cast
from lowtide.fitting.blueprint import components_on_meta, config_patterns
from lowtide.fitting.budgets import AskedBudgets, resolved, warn_without_gpu
from lowtide.fitting.fit import Fit
from lowtide.fitting.meta_subject import Traces, Twin, twin_of
from lowtide.fitting.process import rates_here, usual_base
from lowtide.hub import Source
from lowtide.loading import ComponentSpec, LoadOptions, load_components, read_model_index
from lowtide.memory.presets import stream_for
from lowtide.models.put_weights import Offload
from lowtide.planning.machine_rates import assumed_rates
from lowtide.planning.plan import Budgets, Plan
from lowtide.planning.planner import choose
from lowtide.planning.rates import Rates
from lowtide.planning.run_size import RunSize
from lowtide.planning.workload import Workload
from lowtide.quiet import quiet
from lowtide.sizes import parse_bytes
from lowtide.weights.fill import dtype_name

Specs = Mapping[str, ComponentSpec | None]


@dataclass(frozen=True)
class Planning:
    """All that plans for a checkpoint are made from: see `lowtide.planning.planner.choose`."""

    workload: Workload
    rates: Rates
    budgets: Budgets
    allow: tuple[str, ...]


def plan_checkpoint(
    pretrained: str | os.PathLike[str],
    pipelines: Mapping[str, type[Any]],
    asked: AskedBudgets,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None = None,
    **size: Any,
) -> Planning:
    """What a run of a checkpoint takes, from its configurations alone, and what the device gives.

    `pipelines` are the classes by the names that checkpoints use. A `device` that is not here gets usual rates. Raises
    as loading does, and `ValueError` for a size that the model cannot make.
    """
    source = Source(os.fspath(pretrained))
    class_name, specs, _ = read_model_index(source.fetch(["model_index.json"]))
    if class_name not in pipelines:
        raise ValueError(f"{pretrained} holds a {class_name}; plans are made for {', '.join(pipelines)}.")
    wanted = {name: specs.get(name) for name in pipelines[class_name].component_names}
    twin = _twin(pipelines[class_name], source, wanted, LoadOptions(dtype, variant), {}, device)
    rates, budgets = _machine(device, twin, asked)
    return Planning(twin.workload(twin.pipe.usual_size(**size), asked.allow), rates, budgets, asked.allow)


def _machine(device: torch.device, twin: Twin, asked: AskedBudgets) -> tuple[Rates, Budgets]:
    if device.type == "cpu" or torch.cuda.is_available():
        return rates_here(device, twin.pipe, {}), resolved(device, asked)
    on_host = resolved(torch.device("cpu"), asked)
    try:
        vram = None if asked.vram is None else parse_bytes(asked.vram)
    except ValueError as error:
        raise ValueError(f"vram={asked.vram!r} is not possible without that GPU: give a size such as '6GB'.") from error
    base, context = usual_base(device)
    rates = replace(assumed_rates(dtype_name(twin.pipe.dtype)), base=base, device_base=context)
    return rates, replace(on_host, vram=vram)


def load_within(
    pipeline_class: type[Any],
    source: Source,
    specs: Specs,
    options: LoadOptions,
    given: Mapping[str, Any],
    asked: AskedBudgets,
    device: torch.device,
    asked_size: Mapping[str, Any],
) -> Any:
    """Load a pipeline under the plan for a size, its usual one but for what is asked, so that loading fits in too.

    Raises `BudgetError` before any weight is read where no plan fits.
    """
    networks = {name: part for name, part in given.items() if isinstance(part, nn.Module)}
    check_not_cast(networks)
    warn_without_gpu(device, asked.vram)
    twin = _twin(pipeline_class, source, specs, options, given, device)
    size: RunSize = twin.pipe.usual_size(**asked_size)
    rates, budgets = rates_here(device, twin.pipe, networks), resolved(device, asked)
    plan = choose(twin.workload(size, asked.allow), rates, budgets, asked.allow)
    own = {name: _options_under(plan, name, options, device) for name in twin.in_files if name not in given}
    pipe = pipeline_class(**given, **load_components(source, specs, options, own))
    twin.adopt(pipe)
    pipe.put_under_plan(Fit(budgets, asked.allow, device, rates, twin, size, plan), as_planned=set(own))
    return pipe


def _options_under(plan: Plan, name: str, options: LoadOptions, device: torch.device) -> LoadOptions:
    chosen = plan.components.get(name)
    if chosen is None:
        return options
    offload = None if chosen.rule is None else Offload(chosen.rule, stream_for(device, chosen.rule))
    casting = None if chosen.casting is None else NAMED_CASTINGS[chosen.casting]
    return replace(options, offload=offload, casting=casting)


def _twin(
    pipeline_class: type[Any],
    source: Source,
    specs: Specs,
    options: LoadOptions,
    given: Mapping[str, Any],
    device: torch.device,
) -> Twin:
    """The twin of a checkpoint's pipeline, with what is `given` in place of components of its own."""
    folder = source.fetch(config_patterns(specs))
    parts, in_files = components_on_meta(folder, specs, options)
    with quiet():
        twin = twin_of(pipeline_class(**{**given, **parts}), device, in_files)
    if not any(isinstance(part, nn.Module) for part in given.values()):
        twin.traced = _traced_before(_config_hash(folder, specs, twin))
    return twin


def _config_hash(folder: Path, specs: Specs, twin: Twin) -> str:
    """What tracing a checkpoint depends on besides the size of a run: its configurations, and dtypes in its files."""
    found = hashlib.sha256(repr((type(twin.pipe), specs, twin.device.type, twin.pipe.dtype, twin.in_files)).encode())
    for file in sorted(path for pattern in config_patterns(specs) for path in folder.glob(pattern)):
        found.update(file.read_bytes())
    return found.hexdigest()


@functools.lru_cache(maxsize=4)
def _traced_before(config_hash: str) -> Traces:
    """What was traced so far of checkpoints with the same configurations, of those that were planned for last."""
    return {}


def check_only_budget(offload: str | None, casting: object) -> None:
    """Raise `ValueError` where a budget is given and its parts are chosen by hand too."""
    if offload is not None or casting is not None:
        name = "offload" if offload is not None else "casting"
        raise ValueError(
            f"{name} and a budget are not possible together: a budget chooses both. Leave {name} out, and let weights "
            "rest in 8 bits with allow=('fp8',) or ('int8',); or leave out the budget."
        )
