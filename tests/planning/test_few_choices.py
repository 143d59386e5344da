"""How much is tried to find a plan beside a GPU whose host memory is scarce too, in counts: times are the machine's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.planning.test_loaded_ahead import LINK, network
from tests.planning.test_planner import component, workload

from lowtide.memory.rule import Rule, Tier
from lowtide.planning import frontier
from lowtide.planning.frontier import Limits, best_trades
from lowtide.planning.options import component_options, less_on_host
from lowtide.planning.workload import Workload

MERGED = frontier._merged


def large() -> Workload:
    blocks = ((3000, 5000) * 6, (9000, 2000, 7000) * 8, (3000, 1000) * 4)
    return workload(blocks=blocks)


def test_no_two_choices_are_merged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[Any] = []

    def merged(sums: list[Any], group: list[Any], limit: int | None, to_come: int) -> Iterator[Any]:
        made = list(MERGED(sums, group, limit, to_come))
        pairs.extend(made)
        return iter(made)

    monkeypatch.setattr(frontier, "_merged", merged)
    work = large()
    total = sum(part.nbytes for part in work.components.values())
    assert best_trades(work, LINK, limits=Limits(host=total // 2))
    choices = [tuple(map(id, pair.choices)) for pair in pairs]
    assert 0 < len(choices) == len(set(choices))


def test_options_grow_with_units_and_no_faster() -> None:
    counts = []
    for count in (40, 80):
        part = network([(25600, 2560.0), (2560, 12800.0)] * (count // 2)).components["net"]
        counts.append(len(component_options(part, LINK, (), scarce_host=False)))
    assert counts[1] < 2 * counts[0]
    assert counts[1] < 6 * 80


def test_what_rests_on_the_host_may_rest_in_files() -> None:
    part = component("net", [3000, 5000, 4000])
    plain = component_options(part, LINK, ("fp8",), scarce_host=False)
    less = [other for option in plain for other in less_on_host(option, LINK)]
    assert len(component_options(part, LINK, ("fp8",), scarce_host=True)) == len(plain) + len(less)
    offloaded = [option for option in plain if option.plan.rule is not None and option.plan.casting is None]
    assert len(less) == 2 * len(offloaded)
    assert sum(option.plan.rule == replace(option.plan.rule or Rule(), rest=Tier.DISK) for option in less) == len(
        offloaded
    )
    assert not [
        other
        for option in plain
        for other in less_on_host(replace(option, component=replace(part, in_file=False)), LINK)
    ]
