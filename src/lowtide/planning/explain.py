"""Plans in words: what was chosen and why, and what to try where nothing fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.workload import BLENDED, EXACT, EXACT_ON_DISK, SLICED, WHOLE, Workload
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from lowtide.planning.plan import Budgets, ComponentPlan, Plan, StagePlan

_PLACES = {Tier.DISK: "disk", Tier.HOST: "host memory"}
_LEAST_NAMED = 5_000_000
"""Parts of a peak with fewer bytes, or less than a hundredth of it, are left out."""
_HIDDEN = 1.05
"""Up to so many times the seconds of computing, loads count as hidden behind it."""


def describe(plan: Plan) -> str:
    """The plan as lines of text: what it was made for, each component, each stage, and why."""
    names = [*plan.components, *(stage.name for stage in plan.stages)]
    width = max(map(len, names), default=0)
    lines = [*_header(plan), "Weights"]
    lines += [f"  {name:<{width}}  {held_in_words(one)}" for name, one in plan.components.items()]
    lines += ["Stages", *(f"  {stage.name:<{width}}  {_stage(stage)}" for stage in plan.stages)]
    return "\n".join([*lines, *(["Why", *(f"  {reason}" for reason in plan.why)] if plan.why else [])])


def budgets_in_words(budgets: Budgets, *, on_cpu: bool) -> str:
    """Such as "1.50 GB of memory and 65.30 GB of disk"."""
    sizes = ((place, getattr(budgets, name)) for name, place in _of_what(on_cpu).items())
    given = [f"{format_decimal(size) if size else '0 GB'} of {place}" for place, size in sizes if size is not None]
    return f"{', '.join(given[:-1])} and {given[-1]}" if len(given) > 1 else "".join(given) or "no limit"


def _of_what(on_cpu: bool) -> dict[str, str]:
    return {"vram": "GPU memory", "ram": "memory" if on_cpu else "host memory", "disk": "disk"}


def _header(plan: Plan) -> list[str]:
    on_cpu = plan.device == "cpu"
    peak = f"at most {format_decimal(plan.peak)}" + ("" if on_cpu else " of GPU memory")
    host = "" if on_cpu else f", {format_decimal(plan.host_peak)} of host memory"
    assumed = " (usual figures of such a device, not measured ones)" if plan.assumed else ""
    within = budgets_in_words(plan.budgets, on_cpu=on_cpu)
    return [
        f"Plan for {_run(plan) or 'a run'} on {'the CPU' if on_cpu else plan.device}",
        f"  given     {within}",
        f"  predicted {peak}{host}, {seconds_in_words(plan.seconds)}{assumed}",
        f"  result    {plan.exactness}",
    ]


def _run(plan: Plan) -> str:
    return ", ".join(filter(None, [asked_in_words(plan), plan.dtype]))


def _stage(stage: StagePlan) -> str:
    calls = f", {stage.calls} calls" if stage.calls > 1 else ""
    took = f"{format_decimal(stage.peak)}, {seconds_in_words(stage.seconds)}"
    return f"{took}, bound by {stage.bound}; {WAY_WORDS[stage.way]}{calls}"


def reasons(plan: Plan, workload: Workload) -> tuple[str, ...]:
    """Why the plan is as it is, a sentence each."""
    return (*_component_reasons(plan), *_way_reasons(plan, workload), *_binding(plan))


def _component_reasons(plan: Plan) -> Iterator[str]:
    for name, one in plan.components.items():
        rule, stages = one.rule, [stage for stage in plan.stages if stage.component == name]
        if one.casting:
            yield f"{name}: its weights rest in {one.casting}, {format_decimal(one.nbytes)}, which changes the result"
        if rule is None or rule.level is Level.WHOLE:
            continue
        took, computed = sum(one.seconds for one in stages), sum(one.compute_seconds for one in stages)
        what = f"{one.kept_units} of {one.units} {rule.level}s stay ({format_decimal(one.kept)}); the rest"
        waits = f", which costs {seconds_in_words(took - computed)}"
        behind = " behind the computing" if took <= computed * _HIDDEN else waits
        yield f"{name}: {what if one.kept_units else 'all of it'} streams from {_PLACES[rule.rest]}{behind}"


def _way_reasons(plan: Plan, workload: Workload) -> Iterator[str]:
    for stage in workload.stages:
        way = plan.way(stage.name)
        if way != WHOLE and WHOLE in stage.ways:
            spared = stage.ways[WHOLE].peak - stage.ways[way].peak
            gain = f"which spares {format_decimal(spared)}" if spared > 0 else "which is faster"
            yield f"{stage.name}: {WAY_WORDS[way]}, {gain}"


def _binding(plan: Plan) -> Iterator[str]:
    if plan.stages:
        largest = max(plan.stages, key=lambda stage: stage.peak)
        slowest = max(plan.stages, key=lambda stage: stage.seconds)
        yield f"the peak is in {largest.name}: {parts(largest)}"
        yield f"what binds: {slowest.bound}, in {slowest.name}"


def parts(stage: StagePlan) -> str:
    """What a stage's peak is made of."""
    named = {
        "weights": stage.weights,
        "activations": stage.activations + stage.workspace,
        "carried along": stage.carried,
        "the process itself": stage.base,
        "the allocator": stage.slack,
    }
    least = min(_LEAST_NAMED, stage.peak // 100)
    return ", ".join(f"{format_decimal(size)} {name}" for name, size in named.items() if size > least)


def refusal(smallest: Plan, asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """What to say where no plan fits: what was asked, and the least and what it is made of."""
    largest = max(smallest.stages, key=lambda stage: stage.peak)
    return (
        f"This run ({_run(smallest)}) does not fit {_asked(asked, least, on_cpu=on_cpu)}: it needs at least "
        f"{_changed(asked, least, on_cpu=on_cpu)}. Stage {largest.name!r} takes the most: {parts(largest)}."
    )


def advice(asked: Budgets, least: Budgets, helping: Mapping[str, Budgets], *, on_cpu: bool) -> str:
    """What to do where no plan fits; `helping` are the minimums with what may be allowed, by its name."""
    tries = [f"{_allowing(name)}, which fits" for name, one in helping.items() if _fits(one, asked, on_cpu=on_cpu)]
    lower = [name for name, one in helping.items() if _device(one, on_cpu) < _device(least, on_cpu)]
    if not tries and lower:
        tries = [
            f"{_allowing(name)}, with which {_changed(asked, helping[name], on_cpu=on_cpu)} would do" for name in lower
        ]
    return f"Try {'; '.join([*tries, 'a smaller size'])}, or give it more."


def _allowing(name: str) -> str:
    """How a lossy form is allowed, in Python and as an option."""
    return f'allow=("{name}",) or --allow {name}'


def _device(budgets: Budgets, on_cpu: bool) -> int:
    return (budgets.ram if on_cpu else budgets.vram) or 0


def _fits(least: Budgets, asked: Budgets, *, on_cpu: bool) -> bool:
    """Whether a minimum, made with the other budgets as asked, is within what was asked."""
    pairs = ((least.ram, asked.ram),) if on_cpu else ((least.vram, asked.vram), (least.ram, asked.ram))
    return all(given is None or (needed or 0) <= given for needed, given in pairs)


def _too_small(asked: Budgets, least: Budgets) -> list[str]:
    """The names of the budgets that must be larger."""
    return [one for one in ("vram", "ram", "disk") if getattr(least, one) != getattr(asked, one)]


def _asked(asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """The budgets that are too small, as they were asked for."""
    names = _too_small(asked, least)
    others = {field.name: None for field in fields(asked) if field.name not in names}
    return budgets_in_words(replace(asked, **others), on_cpu=on_cpu)


def _changed(asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """The budgets that must be larger, and the least that they can be."""
    names, of = _too_small(asked, least), _of_what(on_cpu)
    return " and ".join(f"{at_least(getattr(least, name))} of {of[name]}" for name in names)


_LEVELS = {Level.WHOLE: "whole", Level.BLOCK: "by blocks", Level.LEAF: "by leaves"}


_RESTS = {Tier.DISK: "from disk", Tier.HOST: "from host memory", Tier.DEVICE: "from the device"}


WAY_WORDS = {
    WHOLE: "at once",
    SLICED: "one picture at a time",
    EXACT: "row by row",
    EXACT_ON_DISK: "row by row, rows on disk",
    BLENDED: "in blended tiles",
}


def in_words(plan: Plan) -> str:
    """The plan as one line, such as "denoiser by blocks from disk; the rest resident; decode row by row"."""
    return "; ".join([*_weights(plan), *_stages(plan)])


def asked_in_words(plan: Plan) -> str:
    """What the plan was made for, such as "4 × 1024x1024, 30 steps"; empty where it does not say."""
    asked = {name: value for name, value in plan.made_for.items() if value is not None}
    count = f"{asked['pictures']} × " if asked.get("pictures", 1) > 1 else ""
    size = [f"{count}{asked['width']}x{asked['height']}"] if {"width", "height"} <= asked.keys() else []
    counts = [f"{asked[name]} {name}" for name in ("frames", "steps") if name in asked]
    guidance = [] if asked.get("guided", True) else ["no guidance"]
    return ", ".join([*size, *counts, *guidance])


def seconds_in_words(seconds: float) -> str:
    """A time as people read it: "0.42 s", "17.3 s", "4 min 10 s", "2 h 05 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def at_least(size: int) -> str:
    """A size rounded up, so that a budget typed as it is said is enough: 468100000 is "0.47 GB"."""
    step = 10**7 if size >= 10**8 else 10**5 if size >= 10**5 else 100
    return format_decimal(-(-size // step) * step)


def _weights(plan: Plan) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, component in plan.components.items():
        groups.setdefault(held_in_words(component), []).append(name)
    if len(groups) == 1:
        return [f"all weights {found}" for found in groups]
    return [f"{_joined(names)} {found}" for found, names in groups.items()]


def held_in_words(component: ComponentPlan) -> str:
    """How a component is held, such as "by blocks from disk, 0.30 GB stay" or "resident in int8"."""
    form = "" if component.casting is None else f" in {component.casting}"
    return ("resident" if component.rule is None else _rule(component.rule)) + form


def _rule(rule: Rule) -> str:
    said = f"{_LEVELS[rule.level]} {_RESTS[rule.rest]}"
    if rule.rest is Tier.HOST and rule.host_bytes is not None:
        said += f" (above {format_decimal(rule.host_bytes)} from disk)"
    if rule.resident_bytes:
        said += f", {format_decimal(rule.resident_bytes)} stay"
    return said if rule.level is Level.WHOLE or rule.prefetch == 1 else f"{said}, {_ahead(rule.prefetch)}"


def _ahead(prefetch: int) -> str:
    return f"{prefetch} ahead" if prefetch else "nothing ahead"


def _stages(plan: Plan) -> Iterable[str]:
    return [f"{stage.name} {WAY_WORDS[stage.way]}" for stage in plan.stages if stage.way != WHOLE]


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
