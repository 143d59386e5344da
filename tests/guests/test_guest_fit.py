"""Guests within a budget: the plain run's bits under every plan, again, and after it is undone."""

import copy
import functools
import pickle

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of
from tests.guests.guest_cases import CASES, ROWS, WARNINGS, least, weights_of

from lowtide.fitting.meta_subject import MetaSubject
from lowtide.guests.doors import apply_plan, fit, plan_of, report, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.memory.attach import attachment_of
from lowtide.planning.plan import BudgetError, Plan

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]


@functools.cache
def built(name):
    return FAMILIES[name]()


@functools.cache
def plain(name):
    return run(built(name))


@pytest.fixture
def flux():
    family = FAMILIES["Flux2 Klein"]()
    yield family
    unfit(family.pipeline)


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    """The pipelines go with the tests of this file."""
    yield
    for kept in (built, plain):
        kept.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_the_same_under_every_plan(name):
    family, expected = built(name), plain(name)
    own_class, smallest = type(family.pipeline), least(family.pipeline, **family.call)
    try:
        for ram in (smallest, smallest + weights_of(family.pipeline) // 2, "16GB"):
            plan = fit(family.pipeline, ram=ram, **family.call)
            made = run(family)
            assert torch.equal(run(family), made)
            assert plan_of(family.pipeline) is plan  # a decode by rows is no change of the networks
            if plan.exactness == "equal bits":
                assert torch.equal(made, expected)
            else:
                assert (made - expected).abs().max() <= ROWS
        ran = {stage.name: stage.times for stage in report(family.pipeline).stages}
        assert set(ran) == {stage.name for stage in plan.stages}  # all that was foreseen, and nothing else
    finally:
        unfit(family.pipeline)
    assert type(family.pipeline) is own_class
    assert torch.equal(run(family), expected)
    assert all(attachment_of(network) is None for network in modules_of(family.pipeline).values())


def test_the_smallest_plan_streams_and_the_largest_holds_everything(flux):
    smallest = least(flux.pipeline, **flux.call)
    plan = fit(flux.pipeline, ram=smallest, **flux.call)
    assert plan.components["transformer"].rule is not None
    assert fit(flux.pipeline, ram="16GB", **flux.call).components["transformer"].rule is None


def test_another_call_is_planned_anew_before_it_begins(flux):
    fit(flux.pipeline, ram="16GB", **flux.call)
    before = plan_of(flux.pipeline)
    run(flux)
    assert plan_of(flux.pipeline) is before
    flux.pipeline(
        **{**flux.call, "prompt": "a red boat on the sea at dawn"}, generator=torch.Generator().manual_seed(0)
    )
    assert guest_of(flux.pipeline).applied.fit.size.arguments["prompt"].startswith("a red")
    flux.pipeline(**{**flux.call, "height": 64, "width": 96}, generator=torch.Generator())
    assert plan_of(flux.pipeline).stage("vae.decode").activations != before.stage("vae.decode").activations
    fit(flux.pipeline, ram=least(flux.pipeline, **flux.call), **flux.call)
    with pytest.raises(BudgetError, match="at least"):
        flux.pipeline(**{**flux.call, "height": 512, "width": 512})
    assert torch.equal(run(flux), plain("Flux2 Klein"))


def test_what_networks_set_in_their_first_call_is_planned_for_already(flux, monkeypatch):
    flux.pipeline.transformer.kept = (torch.zeros(2),)
    fit(flux.pipeline, ram="16GB", **flux.call)
    monkeypatch.setattr(MetaSubject, "_trace_anew", None)  # nothing may be traced
    for _ in range(2):
        run(flux)
        flux.pipeline.transformer.kept = (torch.ones(2),)  # of tensors only that they are there counts
    flux.pipeline.text_encoder.model.set_by_hand = 3
    with pytest.raises(TypeError):
        run(flux)


def test_a_plan_is_saved_and_put_to_work_again(flux):
    plan = fit(flux.pipeline, ram="16GB", **flux.call)
    unfit(flux.pipeline)
    assert plan_of(flux.pipeline) is None
    apply_plan(flux.pipeline, Plan.from_json(plan.to_json()))
    assert plan_of(flux.pipeline).made_for["height"] == flux.call["height"]
    assert torch.equal(run(flux), plain("Flux2 Klein"))


def test_arguments_are_checked_by_name(flux):
    with pytest.raises(TypeError, match=r"takes no hieght; it takes .*height"):
        fit(flux.pipeline, ram="1GB", hieght=64)
    with pytest.raises(TypeError, match="is no pipeline: give an object"):
        fit(flux.pipeline.transformer, ram="1GB")
    with pytest.raises(RuntimeError, match="no budget was given"):
        report(flux.pipeline)


def test_settings_of_the_peer_are_refused_by_name_or_work(flux):
    pipe = flux.pipeline
    fit(pipe, ram="16GB", **flux.call)
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        with pytest.raises(RuntimeError, match=f"{name} and a budget are not possible together.*lowtide.unfit"):
            getattr(pipe, name)()
    with pytest.raises(RuntimeError, match="within a budget"):
        pipe.to(torch.bfloat16)
    assert pipe.to("cpu") is pipe
    assert pipe.device == pipe._execution_device == torch.device("cpu")
    assert pipe.dtype == torch.float32
    pipe.vae.enable_slicing()
    assert torch.equal(run(flux), plain("Flux2 Klein"))
    unfit(pipe)
    pipe.to(torch.float32)


def test_copies_and_pickles_are_plain_pipelines(flux):
    fit(flux.pipeline, ram=least(flux.pipeline, **flux.call), **flux.call)
    own = type(flux.pipeline).__mro__[1]
    for made in (copy.copy(flux.pipeline), copy.deepcopy(flux.pipeline)):
        assert type(made) is own
        assert guest_of(made) is None
    assert pickle.loads(pickle.dumps(own)) is own


def test_a_call_inside_a_call_is_refused(flux):
    fit(flux.pipeline, ram="16GB", **flux.call)
    heard = []

    def again(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match="is being called"):
            pipe(**flux.call)
        with pytest.raises(RuntimeError, match="is being called"):
            unfit(pipe)
        heard.append(step)
        return tensors

    made = flux.pipeline(**flux.call, generator=torch.Generator().manual_seed(0), callback_on_step_end=again)
    assert heard == [0, 1]
    assert torch.equal(flux.result(made), plain("Flux2 Klein"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(ValueError, marks=pytest.mark.slow)])
def test_after_an_exception_all_is_as_before(flux, error):
    fit(flux.pipeline, ram=least(flux.pipeline, **flux.call), **flux.call)

    def stop(pipe, step, timestep, tensors):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        flux.pipeline(**flux.call, callback_on_step_end=stop)
    assert torch.equal(run(flux), plain("Flux2 Klein"))


def test_memory_that_runs_out_in_a_network_is_gone_on_from(flux):
    pipe, failed = flux.pipeline, []

    def short_of_memory(module, args):
        if not failed and not args and module.training is False:
            failed.append(True)
            raise MemoryError("no more")

    fit(pipe, ram="16GB", **flux.call)
    block = pipe.transformer.transformer_blocks[1]
    handle = block.register_forward_pre_hook(short_of_memory)
    with pytest.warns(UserWarning, match="transformer: memory ran out"):
        made = run(flux)
    handle.remove()
    assert torch.equal(made, plain("Flux2 Klein"))
    assert len(guest_of(pipe).applied.degradations) == 1
    assert "memory ran out" in report(pipe).degradations[0]


def test_it_is_saved_as_it_is_whatever_the_plan(flux, tmp_path):
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in
        modules_of(flux.pipeline).items()}  # fmt: skip
    fit(flux.pipeline, ram=least(flux.pipeline, **flux.call), **flux.call)
    flux.pipeline.save_pretrained(str(tmp_path))
    again = type(flux.pipeline).__mro__[1].from_pretrained(tmp_path)
    for name, part in modules_of(again).items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())


@pytest.mark.parametrize("casting", ["int8", "int4"])
def test_weights_that_rest_in_few_bits_are_saved_as_they_were(flux, tmp_path, casting):
    before = {key: value.clone() for key, value in flux.pipeline.transformer.state_dict().items()}
    plan = fit(flux.pipeline, ram=least(flux.pipeline, **flux.call), allow=(casting,), **flux.call)
    guest = guest_of(flux.pipeline)
    chosen = {name: type(part)(None, casting) for name, part in plan.components.items()}
    guest.applied.put_to_work(guest.applied.fit, type(plan)(**{**vars(plan), "components": chosen}))
    assert not torch.equal(run(flux), plain("Flux2 Klein"))
    flux.pipeline.save_pretrained(str(tmp_path))
    again = type(flux.pipeline).__mro__[1].from_pretrained(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in again.transformer.state_dict().items())
