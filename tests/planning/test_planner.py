"""The planner on made-up workloads: plans are held against every other plan, counted one by one."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowtide.memory.bounds import STAGE_BYTES, Sizes, bound, depth, spread, within
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.frontier import PRECISION, Limits, beside_weights, choices, options_by_component, tick_of
from lowtide.planning.options import component_options, under_rule
from lowtide.planning.pace import Timing, shares_of
from lowtide.planning.plan import LOSSY, BudgetError, Budgets, Plan
from lowtide.planning.planner import Planner, alternatives, choose, curve, minimum
from lowtide.planning.rates import Rates
from lowtide.planning.workload import Call, Component, Stage, UnitSize, Work, Workload

CPU = Rates("cpu", 1e9, 1e9, 1e9, 1e9, 1e-6, 2e8, 1e8, 5e7, 10**9, 1000, contention=0.5)
GPU = Rates("cuda", 1e9, 1e9, 1e9, 1e9, 1e-6, 1e8, 5e7, 2e7, 10**9, 5000, 700, 0.1)
HEAP = replace(CPU, slack=0.5, slack_most=20000, frugal_touched=2e8)
NONE = Limits()
SLOW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def component(name, blocks, *, in_file=True, castings=("fp8",)):
    def unit(place, size, share=1):
        return UnitSize(
            f"{name}.{place}",
            size // share,
            size,
            0 if share == 1 else size // share,
            1,
            False,
            Work(product=size * 9.0),
            size // 4,
        )

    def levels(share):
        return {
            Level.WHOLE: (unit("", sum(blocks), share),),
            Level.BLOCK: tuple(unit(place, size, share) for place, size in enumerate(blocks)),
            Level.LEAF: tuple(unit(place, part, share) for place, size in enumerate(blocks) for part in _parts(size)),
        }

    return Component(name, levels(1), {casting: levels(4 if casting == "int4" else 2) for casting in castings}, in_file)


def _parts(size):
    return size // 3, size - size // 3


def call(peak, seconds, stored=0):
    return Call(peak, peak // 4, 1, Work(convolution=seconds * 1e9), stored)


def workload(blocks=((3000, 5000, 4000), (9000, 2000, 2000, 7000), (3000, 1000)), peaks=(500, 8000, 20000), calls=20):
    names = ("reader", "thinker", "painter")
    components = {name: component(name, sizes) for name, sizes in zip(names, blocks, strict=True)}
    ways = {
        "whole": call(peaks[2], 1e-3),
        "exact": call(peaks[2] // 3, 2e-3),
        "exact on disk": call(peaks[2] // 9, 4e-3, 30000),
        "blended": call(peaks[2] // 9, 1e-3),
    }
    stages = (
        Stage("read", "reader", 1, {"whole": call(peaks[0], 1e-4)}, 10),
        Stage("think", "thinker", calls, {"whole": call(peaks[1], 2e-4)}, 20),
        Stage("paint", "painter", 1, ways, 30),
    )
    return Workload(components, stages, "float32", {"height": 64})


sizes = st.lists(st.integers(1, 60).map(lambda count: count * 256), min_size=1, max_size=4)
workloads = st.builds(
    workload,
    st.tuples(sizes, sizes, sizes),
    st.tuples(*[st.integers(0, 40000)] * 3),
    st.integers(1, 30),
)


def everything(work, rates, allow=(), limits=NONE):
    """Every plan there is, as (bytes on the device, cost)."""
    rates = rates.in_workload(work)
    for one in (rates, rates.frugal):
        if one is not None:
            yield from _everything(work, one, allow, limits, tick_of(work, rates))


def _everything(work, rates, allow, limits, tick):
    held = options_by_component(work, rates, allow, limits)
    groups = [choices(one, work, rates, allow, limits, tick) for one in held]
    for chosen in product(*groups):
        kept = sum(one.option.kept.total for one in chosen)
        peak = 0
        for one in chosen:
            for stage, way, _ in one.ways:
                others = kept - one.option.kept.total
                peak = max(peak, others + one.option.working.total + beside_weights(stage, stage.ways[way], rates))
        beside = sum(one.beside for one in chosen)
        if limits.host is not None and beside > limits.host:
            continue
        yield peak, sum(one.cost for one in chosen), chosen


@SLOW
@given(workloads, st.floats(0, 1), st.sampled_from([CPU, HEAP, GPU]))
def test_no_plan_is_better_than_the_chosen_one(work, share, rates):
    least = minimum(work, rates)
    device = least.ram if rates.on_cpu else least.vram
    every = list(everything(work, rates))
    assert device == min(peak for peak, *_ in every)
    budget = int(device + share * (max(peak for peak, *_ in every) - device))
    budgets = Budgets(ram=budget) if rates.on_cpu else Budgets(vram=budget)
    plan = choose(work, rates, budgets)
    best_cost = min(cost for peak, cost, _ in every if peak <= budget)
    best = [chosen for peak, cost, chosen in every if peak <= budget and cost == best_cost]
    assert plan.peak <= budget
    assert any(plan.components == {one.option.component.name: one.option.plan for one in chosen} for chosen in best)


@settings(SLOW, max_examples=8)
@given(workloads, st.sampled_from([1, 2, 3]))
def test_with_little_host_memory_too(work, part):
    total = sum(one.nbytes for one in work.components.values())
    ram = GPU.base + total // part
    every = list(everything(work, GPU, limits=Limits(host=ram - GPU.base)))
    if not every:
        with pytest.raises(BudgetError):
            choose(work, GPU, Budgets(ram=ram))
        assert minimum(work, GPU, budgets=Budgets(ram=ram)).ram > ram
        return
    assert minimum(work, GPU, budgets=Budgets(ram=ram)).vram == min(peak for peak, *_ in every)
    plan = choose(work, GPU, Budgets(ram=ram))
    assert plan.host_peak <= ram
    assert plan.seconds <= min(sum(p.seconds for c in chosen for *_, p in c.ways) for *_, chosen in every) * 1.01


@SLOW
@given(workloads, st.sampled_from([(), ("fp8",), LOSSY]), st.sampled_from([CPU, HEAP, GPU]))
def test_the_minimum_fits_and_one_byte_less_does_not(work, allow, rates):
    least = minimum(work, rates, allow)
    name = "ram" if rates.on_cpu else "vram"
    plan = choose(work, rates, least, allow)
    assert plan.peak == getattr(least, name)
    with pytest.raises(BudgetError) as caught:
        choose(work, rates, replace(least, **{name: plan.peak - 1}), allow)
    assert caught.value.minimum == least


@SLOW
@given(workloads, st.sampled_from([(), LOSSY]), st.sampled_from([CPU, HEAP, GPU]))
def test_more_memory_is_never_slower(work, allow, rates):
    found = curve(work, rates, allow)
    assert [plan.peak for _, plan in found] == [nbytes for nbytes, _ in found]
    assert [nbytes for nbytes, _ in found] == sorted(nbytes for nbytes, _ in found)
    tolerance = 1 + PRECISION * len(work.components)
    for (_, smaller), (_, larger) in pairwise(found):
        assert larger.seconds <= smaller.seconds * tolerance
        assert all(plan.exactness.startswith(("equal", "exact")) or allow for plan in (smaller, larger))


def test_equally_fast_plans_lose_nothing():
    work = workload()
    work = replace(work, stages=work.stages[:2])
    plan = choose(work, CPU, allow=("blended_tiling",))
    assert plan.exactness == "equal bits"
    one_by_one = replace(plan, stages=(replace(plan.stages[0], way="sliced"), *plan.stages[1:]))
    assert one_by_one.exactness == "exact up to rounding"  # kernels may sum otherwise for a batch
    assert all(one.rule is None for one in plan.components.values())


def test_what_is_allowed_helps_where_little_fits():
    least = minimum(workload(), GPU)
    with_fp8 = minimum(workload(), GPU, ("fp8",))
    assert with_fp8.vram < least.vram
    with pytest.raises(BudgetError, match=r'allow=\("fp8",\) or --allow fp8, which fits'):
        choose(workload(), GPU, with_fp8)
    with pytest.raises(ValueError, match="it may hold fp8"):
        choose(workload(), GPU, allow=("fp4",))


def test_int4_is_taken_where_int8_does_not_do():
    """Of plans that are equally fast the one that loses least is best, and int4 loses ten times what int8 does."""
    allow, limit = ("int8", "int4"), Budgets(disk=0)
    thinker = component("thinker", (9000, 9000), in_file=False, castings=allow)
    work = workload()
    work = replace(work, components={"thinker": thinker}, stages=(work.stages[1],))
    least = {name: minimum(work, CPU, (name,), limit) for name in allow}
    assert least["int4"].ram < least["int8"].ram < minimum(work, CPU, (), limit).ram
    assert minimum(work, CPU, allow, limit) == least["int4"]
    for name, budgets in least.items():
        plan = choose(work, CPU, budgets, allow)
        assert plan.components["thinker"].casting == name
        assert name in plan.exactness
    assert choose(work, CPU, limit, allow).components["thinker"].casting is None


def test_rows_on_disk_only_where_disk_is_given():
    work = workload(peaks=(500, 800, 90000))
    least = minimum(work, CPU)
    assert choose(work, CPU, least).disk == 30000
    without = minimum(work, CPU, budgets=Budgets(disk=29999))
    assert without.ram > least.ram
    assert choose(work, CPU, without).disk == 0


def test_weights_of_no_file_count_on_the_disk():
    work = workload()
    spilled = {name: replace(one, in_file=False) for name, one in work.components.items()}
    work = replace(work, components=spilled)
    total = sum(one.nbytes for one in spilled.values())
    assert choose(work, CPU, minimum(work, CPU)).disk >= total
    least = minimum(work, CPU, budgets=Budgets(disk=0))
    plan = choose(work, CPU, least)
    assert plan.disk == 0
    assert all(one.rule is None for one in plan.components.values())


def test_the_peak_of_a_stage_counts_what_the_others_keep():
    plan = choose(workload(), CPU)
    resident = sum(one.nbytes for one in workload().components.values())
    assert {stage.weights for stage in plan.stages} == {resident}
    offloaded = alternatives(workload(), CPU)["model offload"]
    assert [stage.weights for stage in offloaded.stages] == [one.nbytes for one in workload().components.values()]
    assert offloaded.stages[0].mapped == offloaded.stages[0].weights
    assert offloaded.stages[0].peak == 12000 + 500 + 10 + CPU.base


def test_an_8_bit_layer_is_counted_as_it_works():
    one = component("one", (6000, 9000))
    resident = next(
        o for o in component_options(one, GPU, ("fp8",), scarce_host=False) if o.plan.casting and not o.plan.rule
    )
    assert resident.kept.total == sum(unit.nbytes for unit in one.castings["fp8"][Level.LEAF])
    assert resident.working.total == resident.kept.total + 1500


def test_alternatives_have_names_and_the_next_gigabyte_a_price():
    least = minimum(workload(), CPU)
    found = alternatives(workload(), CPU, least)
    assert list(found)[-2:] == ["smallest", "chosen"]
    assert found["chosen"].peak == least.ram
    assert found["blocks, decode by rows"].way("paint") == "exact"
    more = Planner(workload(), CPU).with_more(least)
    assert more is not None
    assert more.seconds < found["chosen"].seconds


def test_plans_tell_what_they_do_and_go_through_json():
    work = workload()
    plan = choose(work, CPU, Budgets(ram=20000))
    text = str(plan)
    assert all(name in text for name in (*work.components, "read", "think", "paint", "bound by"))
    assert Plan.from_json(plan.to_json()) == plan
    assert any("saves" in reason for reason in plan.why)


# ---- the arithmetic underneath


def test_depth_and_bound():
    assert (depth(0, several=False), depth(1, several=False), depth(1, several=True)) == (1, 2, 3)
    streamed = [Sizes(10, 0), Sizes(4, 30), Sizes(0, 40)]
    assert bound([Sizes(1, 2)], streamed, [Sizes(5, 0)], 2) == Sizes(1 + 20 + 5, 2 + 80)


@given(st.lists(st.integers(0, 10**10), max_size=30), st.integers(0, 10**11))
def test_what_is_spread_stays_within(sizes, budget):
    chosen = spread(sizes, budget)
    assert sum(sizes[place] for place in chosen) <= budget
    if budget >= sum(sizes):
        assert len(chosen) == sum(size > 0 for size in sizes)


@pytest.mark.parametrize("kept", range(1, 13))
def test_equal_units_are_spread_evenly(kept):
    chosen = spread([7] * 12, 7 * kept)
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + 12], strict=True)]
    assert len(chosen) == kept
    assert max(gaps) - min(gaps) <= 1


def test_each_number_of_equal_blocks_is_an_option():
    one = component("one", [2560] * 12)
    counts = {o.plan.kept_units for o in component_options(one, CPU, (), scarce_host=False) if o.plan.rule}
    assert counts >= set(range(12))


def test_what_finds_no_room_is_left_out_and_smaller_ones_come_after():
    assert within([5, 9, 3], 8) == [True, False, True]
    assert within([5, 9, 3], None) == [True, True, True]


# ---- time


def timed(rates, prefetch, resident=0, calls=11, work=100.0):
    one = component("one", [2000] * 10)
    rule = next(
        o.plan.rule
        for o in component_options(one, rates, (), scarce_host=False)
        if o.plan.rule and o.plan.rule.level is Level.BLOCK and o.plan.rule.prefetch == prefetch
    )
    option = under_rule(one, rates, replace(rule, resident_bytes=resident), None)
    return Timing(option, rates, shares_of(option.units, rates), cold=False).stage(calls, work)


def test_loads_hide_behind_computing_but_in_the_first_call():
    rates = replace(CPU, link=1000.0, contention=0.0)
    assert timed(rates, 1).seconds == pytest.approx(11 * 100 + 20)
    assert timed(rates, 0).seconds == pytest.approx(11 * 120)
    assert timed(rates, 1, work=1.0).seconds == pytest.approx(1 + 20 + 10 * 20)
    assert timed(rates, 1, work=10.0, resident=10000).seconds == pytest.approx(10 + 10 + 10 * 10)
    assert timed(rates, 1).link == pytest.approx(11 * 20)


def test_computing_loses_time_to_a_reader_that_shares_its_processors():
    rates = replace(CPU, link=1000.0, contention=0.5)
    assert timed(rates, 1).seconds == pytest.approx(11 * 100 + 20 + 10 * 10)


def test_what_the_cache_cannot_hold_comes_from_the_disk_each_time():
    rates = replace(CPU, link=1000.0, disk=100.0, contention=0.0)
    assert timed(rates, 0).disk == 0
    assert timed(replace(rates, cache=19999), 0).disk == pytest.approx(10 * 200)
    assert timed(replace(rates, cache=19999), 0).seconds == pytest.approx(11 * 100 + 20 + 10 * 200)


def test_what_cannot_be_pinned_takes_longer_and_the_plan_says_so():
    work = workload()
    budgets = Budgets(vram=minimum(work, GPU).vram)
    free = choose(work, GPU, budgets)
    assert free.pinned == free.host_peak - GPU.base
    assert "pinned" in str(free).partition("Weights")[0]
    limited = choose(work, replace(GPU, pinned_most=free.pinned // 4), budgets)
    assert limited.pinned == limited.pinned_most == free.pinned // 4
    assert limited.seconds > free.seconds
    assert any("can be pinned" in reason for reason in limited.why)
    assert not any("can be pinned" in reason for reason in free.why)
    assert Plan.from_json(limited.to_json()) == limited


def test_a_unit_that_is_not_pinned_goes_through_buffers():
    one, rule = component("one", [2000] * 10), Rule(Level.BLOCK, Tier.HOST)
    option = under_rule(one, replace(GPU, pinned_most=5000), rule, None)
    assert [stream.staged for stream in option.streams] == [False] * 2 + [True] * 8
    assert option.host == 20000 + 2 * STAGE_BYTES
    assert under_rule(one, GPU, rule, None).host == 20000
