"""How far ahead plans load beside an accelerator: by bytes where that is faster, and in no more than they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.planning.test_planner import CPU, GPU, component
from tests.sim_tensor import simulated
from torch import nn

from lowtide.memory.attach import attach
from lowtide.memory.bounds import least_room, places
from lowtide.memory.presets import stream_for
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.options import component_options, under_rule
from lowtide.planning.plan import Budgets, Plan
from lowtide.planning.planner import choose
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Call, Stage, UnitSize, Work, Workload
from lowtide.prediction.component import component as predicted

LINK = replace(GPU, link=1e8)
DEVICE = torch.device("sim", 1)


def network(pairs: list[tuple[int, float]]) -> Workload:
    """Units of so many bytes that compute for as long as copying so many bytes takes."""
    part = component("net", [nbytes for nbytes, _ in pairs], castings=())
    units = tuple(
        replace(unit, work=Work(product=worth / LINK.link * LINK.product))
        for unit, (_, worth) in zip(part.units[Level.BLOCK], pairs, strict=True)
    )
    work = Work(product=sum(unit.work.product for unit in units))
    part = replace(part, units={**part.units, Level.BLOCK: units})
    return Workload({"net": part}, (Stage("think", "net", 20, {"whole": Call(256, 0, 1, work)}),), "float32")


UNEVEN = [(25600, 2560.0), *[(2560, 12800.0)] * 4] * 3


def test_bytes_limit_what_is_loaded_ahead_where_that_is_faster() -> None:
    work = network(UNEVEN)
    # room for the largest twice, and for none that stays
    plan = choose(work, LINK, Budgets(vram=LINK.device_base + 256 + 256 + 2 * 25600))
    rule = plan.components["net"].rule
    assert rule is not None
    assert rule.prefetch_bytes is not None
    assert plan.peak <= plan.budgets.vram
    assert "at once" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    units = under_rule(work.components["net"], LINK, replace(rule, prefetch_bytes=None), None)
    assert units.working.total >= plan.stages[0].weights


def test_the_usual_rule_where_bytes_gain_nothing() -> None:
    plan = choose(network([(2560, 5120.0)] * 12), LINK, Budgets(vram=LINK.device_base + 512 + 4 * 2560))
    rule = plan.components["net"].rule
    assert rule is not None
    assert (rule.prefetch, rule.prefetch_bytes) == (1, None)


@pytest.mark.parametrize("rates", [CPU, replace(LINK, unified=True)])
def test_no_bytes_where_there_is_one_memory(rates: Rates) -> None:
    options = component_options(network(UNEVEN).components["net"], rates, (), scarce_host=False)
    assert all(option.plan.rule is None or option.plan.rule.prefetch_bytes is None for option in options)


def test_what_an_option_takes_is_what_its_rule_takes() -> None:
    for option in component_options(network(UNEVEN).components["net"], LINK, (), scarce_host=True):
        rule = option.plan.rule
        if rule is not None:
            same = under_rule(option.component, LINK, rule, None)
            assert (same.working, same.kept, same.host) == (option.working, option.kept, option.host)


@pytest.mark.parametrize("prefetch_bytes", [0, 3000, 7000, 10**6])
@pytest.mark.parametrize("level", [Level.BLOCK, Level.LEAF])
def test_the_engine_takes_what_the_planner_says(level: Level, prefetch_bytes: int) -> None:
    rule = Rule(level, Tier.HOST, prefetch_bytes=prefetch_bytes, resident_bytes=2000)
    block = [nn.Sequential(nn.Linear(8, 24 - place), nn.Linear(24 - place, 8)) for place in range(5)]
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*block)).eval()
    option = under_rule(predicted("net", module, device="cuda"), LINK, rule, None)
    with simulated(), torch.no_grad():
        attachment = attach(module, rule, stream_for(DEVICE, rule))
        for _ in range(3):
            module(torch.randn(2, 8))
        assert attachment.bound == attachment.stream.ledger.peak == option.working.total


def test_the_least_room_begins_anew_as_rarely() -> None:
    sizes = [unit.nbytes for unit in _units(UNEVEN)]
    for room in (25600, 40000, 60000, 90000):
        least = least_room(sizes, room)
        assert max(sizes) <= least <= room
        assert places(sizes, least).count(0) == places(sizes, room).count(0)


def _units(pairs: list[tuple[int, float]]) -> tuple[UnitSize, ...]:
    return network(pairs).components["net"].units[Level.BLOCK]
