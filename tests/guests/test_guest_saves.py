"""What `save_pretrained` writes of a guest: the weights as they are without a budget, wherever they rest."""

from dataclasses import replace

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of
from tests.guests.guest_cases import WARNINGS

import lowtide
from lowtide.guests.doors import fit, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.plan import BudgetError, ComponentPlan

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]
RESTS = {
    "resident": ComponentPlan(),
    "whole, on the host": ComponentPlan(Rule(Level.WHOLE, Tier.HOST)),
    "blocks, on the host": ComponentPlan(Rule(Level.BLOCK, Tier.HOST)),
    "blocks, half of them stay": ComponentPlan(Rule(Level.BLOCK, Tier.HOST, resident_bytes=30_000)),
    "leaves, on disk": ComponentPlan(Rule(Level.LEAF, Tier.DISK, spill=True)),
    "int8": ComponentPlan(casting="int8"),
    "fp8": ComponentPlan(casting="fp8"),
    "leaves on disk, in int8": ComponentPlan(Rule(Level.LEAF, Tier.DISK, spill=True), casting="int8"),
}

IN_DEFAULT = ("blocks, half of them stay", "leaves on disk, in int8")
CASES = [pytest.param(name, marks=() if name in IN_DEFAULT else pytest.mark.slow) for name in RESTS]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """As its own library loads it, since weights that are in no file keep what 8 bits hold of them."""
    folder, family = tmp_path_factory.mktemp("saved"), FAMILIES["Flux2 Klein"]()
    family.pipeline.save_pretrained(str(folder))
    pipe = type(family.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return replace(family, pipeline=pipe)


def weights(pipe):
    return {
        f"{name}.{key}": value.clone()
        for name, part in modules_of(pipe).items()
        for key, value in part.state_dict().items()
    }


def check_saved(own, folder, expected):
    saved = weights(own.from_pretrained(folder))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rest", CASES)
def test_they_are_the_same_wherever_they_rest(flux, rest, tmp_path):
    pipe, own, expected = flux.pipeline, type(flux.pipeline), weights(flux.pipeline)
    try:
        plan = fit(pipe, ram="16GB", allow=("int8", "fp8"), **flux.call)
        applied = guest_of(pipe).applied
        applied.put_to_work(applied.fit, replace(plan, components=dict.fromkeys(plan.components, RESTS[rest])))
        pipe.save_pretrained(str(tmp_path))
        check_saved(own, tmp_path, expected)
    finally:
        unfit(pipe)
    assert all(torch.equal(now, expected[name]) for name, now in weights(pipe).items())


@pytest.mark.parametrize("is_least", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["least", "plenty"])
def test_they_can_be_saved_over_the_files_that_they_rest_in(flux, is_least, tmp_path):
    """Its own library writes files beside the old ones, which stay until nothing needs them."""
    expected = weights(flux.pipeline)
    flux.pipeline.save_pretrained(str(tmp_path))
    with pytest.raises(BudgetError) as refusal:
        lowtide.load(tmp_path, ram="10MB", native=False, **flux.call)
    ram = refusal.value.minimum.ram if is_least else "16GB"
    pipe = lowtide.load(tmp_path, ram=ram, native=False, **flux.call)
    pipe.set_progress_bar_config(disable=True)
    made = run(replace(flux, pipeline=pipe))
    pipe.save_pretrained(str(tmp_path))
    check_saved(type(flux.pipeline), tmp_path, expected)
    assert torch.equal(run(replace(flux, pipeline=pipe)), made)
