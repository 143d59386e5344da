"""Units that stay because computing would wait for their copies: which they are, and that rules keep just these."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.test_loaded_ahead import DEVICE, LINK, network
from tests.sim_tensor import simulated
from torch import nn

from lowtide.memory.attach import attach
from lowtide.memory.presets import stream_for
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.memory.store import DiskRest
from lowtide.planning.options import component_options, under_rule
from lowtide.planning.plan import Budgets, Plan
from lowtide.planning.planner import choose
from lowtide.planning.residents import in_step
from lowtide.prediction.component import component as predicted
from lowtide.prediction.component import trace

STRETCHES = [(25600, 10240.0)] * 6 + [(10240, 20480.0)] * 12
"""First for longer to copy than to compute, then for longer to compute."""


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 5)), max_size=20), st.integers(0, 200))
def test_they_find_room(pairs: list[tuple[int, float]], budget: int) -> None:
    sizes, computes = [size for size, _ in pairs], [compute for _, compute in pairs]
    chosen = in_step(sizes, computes, budget)
    assert sum(sizes[place] for place in chosen) <= budget
    assert chosen == sorted(set(chosen))


def test_they_are_spread_over_the_stretch_that_copies_for_longer() -> None:
    pairs = [STRETCHES[0]] * 12 + [STRETCHES[-1]] * 12
    chosen = in_step([size for size, _ in pairs], [compute for _, compute in pairs], 4 * 25600)
    assert len(chosen) == 4
    assert max(chosen) < 12
    assert all(second - first > 1 for first, second in pairwise(chosen))


def test_a_plan_names_them_where_that_is_faster_and_json_keeps_them() -> None:
    work = network(STRETCHES)
    budgets = Budgets(vram=LINK.device_base + 512 + 6 * 25600)
    plan = choose(work, LINK, budgets)
    rule = plan.components["net"].rule
    assert rule is not None
    assert rule.resident_units
    assert plan.peak <= budgets.vram
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read.components["net"].rule.resident_units == rule.resident_units


def test_where_no_work_is_known_they_are_spread_evenly() -> None:
    options = component_options(network([(2560, 0.0)] * 8).components["net"], LINK, (), scarce_host=False)
    assert all(option.plan.rule is None or option.plan.rule.resident_units is None for option in options)


def module() -> nn.Module:
    block = [nn.Sequential(nn.Linear(8, 24 - place), nn.Linear(24 - place, 8)) for place in range(5)]
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*block)).eval()


def test_the_engine_keeps_those_that_the_plan_names() -> None:
    made = module()
    part = predicted("net", made, device="cuda")
    names = tuple(part.units[Level.BLOCK][place].name for place in (1, 4))
    rule = Rule(Level.BLOCK, Tier.HOST, prefetch_bytes=4000, resident_units=names)
    rule = Rule.from_dict(rule.to_dict())
    option, x = under_rule(part, LINK, rule, None), torch.randn(2, 8)
    with simulated(), torch.no_grad():
        plain = made(x)
        attachment = attach(made, rule, stream_for(DEVICE, rule))
        for _ in range(3):
            assert torch.equal(made(x).cpu(), plain)
        assert {unit.name for unit in attachment.units if unit.stays} == set(names)
        assert attachment.bound == attachment.stream.ledger.peak == option.working.total


class Backwards(nn.Module):
    """Has its blocks in another order than it calls them, as U-Nets have their middle last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=place % 2 == 0) for place in range(5))
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.wide, *reversed(self.blocks)):
            x = block(x)
        return x


@pytest.mark.parametrize("budget", [700, 1500, 3000, 5000])
@pytest.mark.parametrize("limited", ["resident_bytes", "host_bytes"])
def test_the_engine_keeps_those_that_the_plan_counts(limited: str, budget: int) -> None:
    made = Backwards().eval()
    traced = trace(lambda: made(torch.empty(2, 8, device="meta")), [made.to("meta")], (), device="cuda")
    part = predicted("net", made, device="cuda", traced=traced)
    rule = Rule(Level.BLOCK, Tier.HOST, **{limited: budget})
    option = under_rule(part, LINK, rule, None)
    streamed = {option.units[stream.place].name: stream.on_disk for stream in option.streams}
    with simulated():
        attachment = attach(made.to_empty(device="cpu"), replace(rule, spill=True), stream_for(DEVICE, rule))
        assert streamed.keys() == {unit.name for unit in attachment.units if not unit.stays}
        for unit in attachment.units:
            if not unit.stays:
                assert streamed[unit.name] == any(isinstance(weight.rest, DiskRest) for weight in unit.weights)


def test_names_that_are_not_there_are_said_and_less_stays() -> None:
    rule = Rule(Level.BLOCK, Tier.HOST, resident_units=("Sequential.gone.weight",))
    with simulated(), pytest.warns(UserWarning, match=r"1 of 1 units that were to stay .* 'Sequential\.gone\.weight'"):
        attachment = attach(module(), rule, stream_for(DEVICE, rule))
    assert not any(unit.stays for unit in attachment.units)
