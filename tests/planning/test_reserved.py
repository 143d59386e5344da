"""What an accelerator's allocator takes beside tensors counts against the budget, and the plan says so."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from tests.planning.plans import MB, on_cpu, on_gpu
from tests.planning.test_planner import GPU, call, workload

from lowtide.planning.plan import BudgetError, Budgets, Plan
from lowtide.planning.planner import choose, minimum
from lowtide.planning.rates import Rates
from lowtide.planning.workload import WHOLE, Workload

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
