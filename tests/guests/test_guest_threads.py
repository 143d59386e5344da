"""Two threads on one pipeline of the peer that is, or comes, within a budget: the second waits."""

import pytest
import torch
from tests.forked import Beside, Parked
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of
from tests.guests.guest_cases import WARNINGS, least
from tests.lines import line_of

from lowtide.guests.doors import fit, plan_of, report, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.memory import attachment_of

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]


@pytest.fixture(scope="module")
def kept():
    family = FAMILIES["Flux2 Klein"]()
    return family, run(family), least(family.pipeline, **family.call)


@pytest.fixture
def flux(kept):
    yield kept
    unfit(kept[0].pipeline)
    assert guest_of(kept[0].pipeline) is None


PUT_TO_WORK = line_of("fitting/applied_plan.py", "applied.put_to_work(")
BETWEEN_NETWORKS = line_of("guests/brackets.py", "stage.advance()")


def test_a_first_fit_waits_for_another(flux):
    """And both go through one guest, whatever the first one comes to."""
    family, expected, smallest = flux
    pipe, call = family.pipeline, family.call
    with Parked(lambda: fit(pipe, ram=smallest, **call), PUT_TO_WORK) as parked:
        other = Beside(lambda: fit(pipe, ram="16GB", **call))
        assert other.waits
    assert parked.result != other.ended()
    assert plan_of(pipe) == other.ended()
    assert torch.equal(run(family), expected)
    unfit(pipe)
    assert all(attachment_of(network) is None for network in modules_of(pipe).values())
    assert torch.equal(run(family), expected)


def test_what_undoes_waits_for_a_first_fit(flux):
    family, expected, smallest = flux
    pipe, call = family.pipeline, family.call
    own = type(pipe)
    with Parked(lambda: fit(pipe, ram=smallest, **call), PUT_TO_WORK):
        other = Beside(lambda: unfit(pipe))
        assert other.waits
    other.ended()
    assert type(pipe) is own
    assert plan_of(pipe) is None
    assert torch.equal(run(family), expected)


def test_a_call_that_waited_while_the_budget_was_undone_is_a_plain_one(flux):
    family, expected, smallest = flux
    pipe = family.pipeline
    fit(pipe, ram=smallest, **family.call)
    with Parked(lambda: unfit(pipe), line_of("memory/attach.py", "attachment.restore(to_given=True)")):
        call = Beside(lambda: run(family))
        assert call.waits
    assert torch.equal(call.ended(), expected)
    assert guest_of(pipe) is None


def test_methods_looked_up_before_the_budget_was_undone_are_the_peers_own(flux):
    family, expected, _ = flux
    pipe, own = family.pipeline, type(family.pipeline)
    fit(pipe, ram="16GB", **family.call)
    to, within, offload = pipe.to, type(pipe), pipe.reset_device_map
    unfit(pipe)
    assert to(torch.float32) is pipe
    assert within.device.fget(pipe) == own.device.fget(pipe)
    offload()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(family.result(within.__call__(pipe, **family.call, generator=generator)), expected)


def test_saving_and_changing_wait_for_a_call(flux, tmp_path):
    family, expected, _ = flux
    pipe = family.pipeline
    fit(pipe, ram="16GB", **family.call)
    with Parked(lambda: run(family), BETWEEN_NETWORKS) as parked:
        begun = [
            Beside(lambda: pipe.save_pretrained(tmp_path / "saved")),
            Beside(pipe.unload_lora_weights),
            Beside(lambda: fit(pipe, ram="16GB", **family.call)),
            Beside(lambda: run(family)),
        ]
        assert all(each.waits for each in begun)
    assert torch.equal(parked.result, expected)
    assert torch.equal(begun[-1].ended(), expected)
    for each in begun:
        each.ended()


def test_what_another_thread_calls_is_no_step_of_the_run(flux):
    family, expected, _ = flux
    pipe = family.pipeline
    fit(pipe, ram="16GB", **family.call)
    run(family)
    alone = {stage.name: stage.times for stage in report(pipe).stages}
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 4, 4)
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    with Parked(lambda: run(family), BETWEEN_NETWORKS) as parked:
        assert torch.equal(Beside(lambda: pipe.vae.decode(latents, return_dict=False)[0]).ended(), decoded)
    assert torch.equal(parked.result, expected)
    assert {stage.name: stage.times for stage in report(pipe).stages} == alone
