"""What an accelerator's allocator takes beside tensors counts against the budget, and the plan says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import pytest
from tests.planning.plans import MB, on_cpu, on_gpu
from tests.planning.test_planner import GPU, call, component, workload

from lowtide.machine.segments import LARGE, MIB
from lowtide.memory.rule import Level, Rule
from lowtide.planning.options import Option, under_rule
from lowtide.planning.plan import BudgetError, Budgets, Plan
from lowtide.planning.planner import choose, minimum
from lowtide.planning.rates import Rates
from lowtide.planning.workload import WHOLE, Workload
from lowtide.prediction.caching_allocator import CachingAllocator

RATES = replace(GPU, device_base=700, libraries=300)


def with_spare(spare: int) -> Workload:
    """The last of its stages has a peak of 20000 bytes, and the others of 1000."""
    work = workload()
    stages = [replace(stage, ways={WHOLE: call(1000, 1.0)}, carried=0) for stage in work.stages]
    ways = {WHOLE: replace(call(20000, 1.0), spare=spare)}
    return replace(work, stages=(*stages[:-1], replace(stages[-1], ways=ways)))


@pytest.mark.parametrize(("spare", "slack"), [(0, 2000), (1500, 2000), (9000, 9000)])
def test_the_slack_is_what_is_known_and_a_tenth_at_least(spare: int, slack: int) -> None:
    plan = choose(with_spare(spare), RATES)
    last = plan.stages[-1]
    assert last.slack == slack
    assert last.allocated == last.weights + 20000 + 300
    assert last.reserved == last.allocated + slack
    assert last.peak == last.reserved + 400, "the driver's context, which PyTorch does not count"


def test_it_counts_against_the_budget() -> None:
    little, much = minimum(with_spare(2000), RATES), minimum(with_spare(9000), RATES)
    assert little.vram is not None
    assert much.vram == little.vram + 7000
    with pytest.raises(BudgetError):
        choose(with_spare(9000), RATES, Budgets(vram=much.vram - 1))
    assert choose(with_spare(9000), RATES, much).peak <= much.vram


def test_a_plan_has_a_line_of_it_beside_a_gpu() -> None:
    plan = on_gpu()
    stages = tuple(replace(stage, libraries=10 * MB) for stage in plan.stages)
    (line,) = [line for line in str(replace(plan, stages=stages)).splitlines() if line.startswith("  reserved")]
    assert line == "  reserved  5.46 GB by PyTorch, 5.34 GB of it in use; 0.41 GB by the driver"
    assert "reserved" not in str(on_cpu())
    assert "reserved" not in str(replace(plan, unified=True))


def test_plans_of_before_are_read() -> None:
    content = on_gpu().to_dict()
    for stage in content["stages"]:
        del stage["libraries"]
    assert Plan.from_dict(content) == on_gpu()


def test_without_known_libraries_all_of_the_base_is_the_drivers() -> None:
    rates = Rates(**{**asdict(RATES), "libraries": 0})
    assert choose(with_spare(0), rates).stages[-1].libraries == 0


BLOCKS = (11 * MIB + 512, 30 * MIB + 1024, 15 * MIB + 512, 2 * MIB)


def in_blocks(rates: Rates, rule: Rule) -> Option:
    return under_rule(component("unet", BLOCKS), rates, rule, None)


def simulated(sizes: Iterable[int]) -> int:
    """Bytes that the allocator reserves for buffers of these sizes beyond what they take."""
    allocator = CachingAllocator()
    for place, size in enumerate(size for size in sizes if size >= LARGE):
        allocator.allocate(place, size)
    return allocator.reserved - allocator.allocated


def test_what_buffers_of_weights_are_rounded_up_by_counts() -> None:
    kept = in_blocks(RATES, Rule(Level.BLOCK, resident_bytes=sum(BLOCKS))).kept
    assert kept.rounding == simulated(BLOCKS)
    assert kept.used == sum(BLOCKS)
    streamed = in_blocks(RATES, Rule(Level.BLOCK, prefetch=1)).working
    assert streamed.rounding >= simulated([max(BLOCKS)] * 2)
    assert streamed.used == 2 * max(BLOCKS)
    by_bytes = in_blocks(RATES, Rule(Level.BLOCK, prefetch=1, prefetch_bytes=40 * MIB)).working
    assert (by_bytes.used, by_bytes.rounding) == (40 * MIB, 2 * MIB)


def test_it_is_a_part_of_the_slack_and_not_of_what_is_in_use() -> None:
    work = workload(blocks=(BLOCKS, BLOCKS, BLOCKS))
    plan = choose(work, RATES, Budgets(vram=10**9))
    assert all(planned.rule is None for planned in plan.components.values())
    assert plan.stages[0].allocated == plan.stages[0].weights + plan.stages[0].allocated_beside_weights + 300
    assert plan.stages[0].weights == 3 * sum(BLOCKS)
    least = minimum(work, RATES)
    assert choose(work, RATES, least).peak <= least.vram


def test_segments_that_grow_round_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert in_blocks(RATES, Rule(Level.BLOCK, resident_bytes=sum(BLOCKS))).kept.rounding == 0
    monkeypatch.undo()
    assert in_blocks(replace(RATES, device="mps"), Rule(Level.BLOCK, resident_bytes=sum(BLOCKS))).kept.rounding == 0
