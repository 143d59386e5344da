"""Plans in words: what was chosen, why, and what to try where nothing fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from lowtide.casting.casting import INT8_DYNAMIC, PACKED
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.workload import BLENDED, EXACT, EXACT_ON_DISK, SLICED, WHOLE, Workload
from lowtide.sizes import format_decimal

if TYPE_CHECKING:
    from lowtide.planning.plan import Budgets, ComponentPlan, Plan, StagePlan

_PLACES = {Tier.DISK: "disk", Tier.HOST: "host memory"}
_LEAST_NAMED = 5_000_000
"""Bytes. A part of a peak is named if it is larger than this, or larger than a hundredth of the peak."""
_WORTH_SAYING = 0.1
"""Of the seconds of a run: what is saved is named from this share on."""
_HIDDEN = 1.05
"""Loads count as hidden if stages take at most this many times the seconds that computing alone takes."""


def describe(plan: Plan) -> str:
    """The plan as lines of text: what it was made for, each component, each stage, and why."""
    names = [*plan.components, *(stage.name for stage in plan.stages)]
    width = max(map(len, names), default=0)
    lines = [*_header(plan), "Weights"]
    lines += [f"  {name:<{width}}  {held_in_words(component)}" for name, component in plan.components.items()]
    lines += ["Stages", *(f"  {stage.name:<{width}}  {_stage(stage)}" for stage in plan.stages)]
    return "\n".join([*lines, *(["Why", *(f"  {reason}" for reason in plan.why)] if plan.why else [])])


def budgets_in_words(budgets: Budgets, *, on_cpu: bool) -> str:
    """Budgets in words, such as "1.50 GB of memory and 65.30 GB of disk"."""
    sizes = ((noun, getattr(budgets, name)) for name, noun in _budget_nouns(on_cpu).items())
    given = [f"{format_decimal(size) if size else '0 GB'} of {noun}" for noun, size in sizes if size is not None]
    return f"{', '.join(given[:-1])} and {given[-1]}" if len(given) > 1 else "".join(given) or "no limit"


def _budget_nouns(on_cpu: bool) -> dict[str, str]:
    return {"vram": "GPU memory", "ram": "memory" if on_cpu else "host memory", "disk": "disk"}


def _header(plan: Plan) -> list[str]:
    on_cpu = plan.device == "cpu" or plan.unified
    peak = f"at most {format_decimal(plan.peak)}" + ("" if on_cpu else " of GPU memory")
    pinned = f" ({format_decimal(plan.pinned)} pinned)" if plan.pinned else ""
    host = "" if on_cpu else f", {format_decimal(plan.host_peak)} of host memory{pinned}"
    assumed = " (assumed from usual figures of such a device, not measured)" if plan.assumed else ""
    within = budgets_in_words(plan.budgets, on_cpu=on_cpu)
    return [
        f"Plan for {_run(plan) or 'a run'} on {'the CPU' if plan.device == 'cpu' else plan.device}",
        f"  given     {within}",
        f"  predicted {peak}{host}, {seconds_in_words(plan.seconds)}{assumed}",
        *([] if on_cpu else _reserved(plan)),
        f"  result    {plan.exactness}",
    ]


def _reserved(plan: Plan) -> Iterator[str]:
    if plan.stages:
        largest = max(plan.stages, key=lambda stage: stage.reserved)
        reserved, used, context = largest.reserved, largest.allocated, largest.base - largest.libraries
        held = f"{format_decimal(reserved)} by PyTorch, {format_decimal(used)} of it in use"
        yield f"  reserved  {held}; {format_decimal(context) if context else '0 GB'} by the driver"


def _run(plan: Plan) -> str:
    return ", ".join(filter(None, [asked_in_words(plan), plan.dtype]))


def _stage(stage: StagePlan) -> str:
    calls = f", {stage.calls} calls" if stage.calls > 1 else ""
    peak_and_time = f"{format_decimal(stage.peak)}, {seconds_in_words(stage.seconds)}"
    return f"{peak_and_time}, bound by {stage.bound}; {WAY_WORDS[stage.way]}{calls}"


def reasons(plan: Plan, workload: Workload) -> tuple[str, ...]:
    """The reasons of a plan: how components are held, how stages are gone through, and what limits the run."""
    return (*_component_reasons(plan), *_way_reasons(plan, workload), *_pinning(plan), *_limiting(plan))


def packing(plan: Plan, saved: float) -> Iterator[str]:
    """That packed weights would save so many seconds, where that is worth saying."""
    if saved > _WORTH_SAYING * plan.seconds:
        yield f"packed weights would save about {seconds_in_words(saved)}, up to rounding: allow packed"


def _component_reasons(plan: Plan) -> Iterator[str]:
    for name, component in plan.components.items():
        if component.casting:
            size = format_decimal(component.nbytes)
            if component.casting == PACKED:
                yield f"{name}: its weights rest packed ({size}), which is faster, and the same up to rounding"
            elif component.casting == INT8_DYNAMIC:
                yield f"{name}: its weights rest in int8 ({size}), and multiply so, which changes the result"
            else:
                yield f"{name}: its weights rest in {component.casting} ({size}), which changes the result"
        if component.rule is not None and component.rule.level is not Level.WHOLE:
            yield f"{name}: {_streaming(component, component.rule, plan.stages_of(name))}"


def _streaming(component: ComponentPlan, rule: Rule, stages: list[StagePlan]) -> str:
    """What of a component streams, from where, and what waiting for it costs."""
    seconds, computing = sum(stage.seconds for stage in stages), sum(stage.compute_seconds for stage in stages)
    waiting = f"which costs {seconds_in_words(seconds - computing)}"
    cost = "hidden behind computing" if seconds <= computing * _HIDDEN else waiting
    kept = (
        f"{component.kept_units} of {component.units} {rule.level}s stay ({format_decimal(component.kept)}), the rest"
    )
    weights = f"{kept} streams" if component.kept_units else "all its weights stream"
    return f"{weights} from {_PLACES[rule.rest]}, {cost}"


def _way_reasons(plan: Plan, workload: Workload) -> Iterator[str]:
    for stage in workload.stages:
        way = plan.way(stage.name)
        if way != WHOLE and WHOLE in stage.ways:
            saved = stage.ways[WHOLE].peak - stage.ways[way].peak
            gain = f"which saves {format_decimal(saved)}" if saved > 0 else "which is faster"
            yield f"{stage.name}: {WAY_WORDS[way]}, {gain}"


def _pinning(plan: Plan) -> Iterator[str]:
    rests = any(part.rule is not None and part.rule.rest is Tier.HOST for part in plan.components.values())
    if rests and plan.device != "cpu" and plan.pinned >= plan.pinned_most:
        most = f"no more than {format_decimal(plan.pinned_most)} of it" if plan.pinned_most else "none of it"
        yield f"host memory: {most} can be pinned, and copies from the rest take longer"


def _limiting(plan: Plan) -> Iterator[str]:
    if plan.stages:
        largest = max(plan.stages, key=lambda stage: stage.peak)
        slowest = max(plan.stages, key=lambda stage: stage.seconds)
        yield f"the peak is in {largest.name}: {parts(largest)}"
        yield f"the slowest stage is {slowest.name}, bound by {slowest.bound}"


def parts(stage: StagePlan) -> str:
    """A stage's peak by its parts, such as "46.4 MB of weights, 0.25 GB of activations"."""
    sizes = {
        "of weights": stage.weights,
        "of activations": stage.activations + stage.workspace,
        "of tensors kept between calls": stage.carried,
        "for the process itself": stage.base,
        "for the allocator": stage.slack,
    }
    least = min(_LEAST_NAMED, stage.peak // 100)
    return ", ".join(f"{format_decimal(size)} {part}" for part, size in sizes.items() if size > least)


def refusal(smallest: Plan, asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """The first part of a refusal: what was asked, the least that fits, and what takes the most."""
    largest = max(smallest.stages, key=lambda stage: stage.peak)
    return (
        f"This run ({_run(smallest)}) does not fit in {_asked(asked, least, on_cpu=on_cpu)}: it needs at least "
        f"{_changed(asked, least, on_cpu=on_cpu)}. Stage {largest.name!r} takes the most: {parts(largest)}."
    )


def advice(asked: Budgets, least: Budgets, helping: Mapping[str, Budgets], *, on_cpu: bool) -> str:
    """What to try where no plan fits; `helping` has the least budgets with each lossy form allowed, by its name."""
    fitting = [name for name, needed in helping.items() if _fits(needed, asked, on_cpu=on_cpu)]
    lower = [name for name, needed in helping.items() if _device(needed, on_cpu) < _device(least, on_cpu)]
    tries = [f"{_allowing(name)}, which fits" for name in fitting] or [
        f"{_allowing(name)}, which needs {_changed(asked, helping[name], on_cpu=on_cpu)}" for name in lower
    ]
    return f"Try {'; '.join([*tries, 'a smaller size or a larger budget'])}."


def _allowing(name: str) -> str:
    """How a lossy form is allowed, in Python and as an option."""
    return f'allow=("{name}",) or --allow {name}'


def _device(budgets: Budgets, on_cpu: bool) -> int:
    return (budgets.ram if on_cpu else budgets.vram) or 0


def _fits(least: Budgets, asked: Budgets, *, on_cpu: bool) -> bool:
    """Whether the budgets that were asked for are at least the least ones."""
    pairs = ((least.ram, asked.ram),) if on_cpu else ((least.vram, asked.vram), (least.ram, asked.ram))
    return all(given is None or (needed or 0) <= given for needed, given in pairs)


def _too_small(asked: Budgets, least: Budgets) -> list[str]:
    """The names of the budgets that must be larger."""
    return [name for name in ("vram", "ram", "disk") if getattr(least, name) != getattr(asked, name)]


def _asked(asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """The budgets that are too small, as they were asked for."""
    names = _too_small(asked, least)
    others = {field.name: None for field in fields(asked) if field.name not in names}
    return budgets_in_words(replace(asked, **others), on_cpu=on_cpu)


def _changed(asked: Budgets, least: Budgets, *, on_cpu: bool) -> str:
    """The budgets that must be larger, and the least that they can be."""
    names, nouns = _too_small(asked, least), _budget_nouns(on_cpu)
    return " and ".join(f"{at_least(getattr(least, name))} of {nouns[name]}" for name in names)


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
    """The plan as one line, such as "denoiser by blocks from disk; decoder resident; decode row by row"."""
    return "; ".join([*_weights(plan), *_stages(plan)])


_ASKED = {
    "num_inference_steps": "steps",
    "num_frames": "frames",
    "video_length": "frames",
    "num_images_per_prompt": "pictures",
    "num_videos_per_prompt": "pictures",
}
"""What a call of another library's pipeline may name otherwise."""


def asked_in_words(plan: Plan) -> str:
    """What the plan was made for, such as "4 × 1024x1024, 30 steps"; empty where the plan does not say."""
    asked = {_ASKED.get(name, name): value for name, value in plan.made_for.items() if value is not None}
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
    """A size rounded up, so that it is enough when it is typed as a budget: 468100000 is "0.47 GB"."""
    step = 10**7 if size >= 10**8 else 10**5 if size >= 10**5 else 100
    return format_decimal(-(-size // step) * step)


def _weights(plan: Plan) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, component in plan.components.items():
        groups.setdefault(held_in_words(component), []).append(name)
    if len(groups) == 1:
        return [f"all weights {held}" for held in groups]
    return [f"{_joined(names)} {held}" for held, names in groups.items()]


def held_in_words(component: ComponentPlan) -> str:
    """How a component is held, such as "by blocks from disk, 0.30 GB stay" or "resident in int8"."""
    forms = {None: "", PACKED: ", packed", INT8_DYNAMIC: " and multiplied in int8"}
    form = forms.get(component.casting, f" in {component.casting}")
    return ("resident" if component.rule is None else _rule(component.rule)) + form


def _rule(rule: Rule) -> str:
    words = f"{_LEVELS[rule.level]} {_RESTS[rule.rest]}"
    if rule.rest is Tier.HOST and rule.host_bytes is not None:
        words += f" (above {format_decimal(rule.host_bytes)} from disk)"
    if rule.resident_bytes:
        words += f", {format_decimal(rule.resident_bytes)} stay"
    if rule.prefetch_bytes is not None:
        return f"{words}, {format_decimal(rule.prefetch_bytes)} at once"
    return words if rule.level is Level.WHOLE or rule.prefetch == 1 else f"{words}, {_ahead(rule.prefetch)}"


def _ahead(prefetch: int) -> str:
    return f"{prefetch} ahead" if prefetch else "nothing ahead"


def _stages(plan: Plan) -> Iterable[str]:
    return [f"{stage.name} {WAY_WORDS[stage.way]}" for stage in plan.stages if stage.way != WHOLE]


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
