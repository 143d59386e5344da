"""A plan in a few words: where weights rest, and which stages are not gone through whole."""

from __future__ import annotations

from collections.abc import Iterable

from lowtide.memory.costs import BLENDED, EXACT, EXACT_ON_DISK, SLICED, WHOLE
from lowtide.memory.forms import Level, Rule, Tier
from lowtide.memory.plan import ComponentPlan, Plan
from lowtide.sizes import format_decimal

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
    """The plan as one line, such as "unet by blocks from disk; the rest resident; decode row by row"."""
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
