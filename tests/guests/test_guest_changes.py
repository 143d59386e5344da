"""Guests that people change within a budget: as the plain pipeline that was changed so, planned anew, or refused."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from tests.guests import guest_parts as parts
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of, saved_and_loaded
from tests.guests.guest_cases import WARNINGS, least
from tests.guests.guest_changes import CHANGES, another_unet

import lowtide
from lowtide.casting.cast_module import is_cast
from lowtide.guests.doors import fit, plan_of, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.memory.attach import attachment_of
from lowtide.memory.rule_changes import has_all_parameters
from lowtide.planning.plan import ComponentPlan

pytest.importorskip("diffusers")
pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:.*Attention backends are an experimental:UserWarning"),
    pytest.mark.usefixtures("traced_once"),
]
IN_DEFAULT = ("fuse_qkv_projections of the network",)


def slow_but(name, *in_default):
    return () if name in in_default else pytest.mark.slow


CASES = [pytest.param(name, marks=slow_but(name, *IN_DEFAULT)) for name in CHANGES]
ROOM = 400_000
"""Bytes for what comes with a change, beside the least that the pipeline needs without it."""


def stable_diffusion(**call):
    family = FAMILIES["StableDiffusion"]()
    return replace(family, call={**family.call, **call})


def changed(family, name):
    """What a pipeline gives before it is changed and after it."""
    change, arguments = CHANGES[name]
    before = run(family)
    torch.manual_seed(0)  # the peer draws numbers for tokens that are new, and puts others in their place
    change(family.pipeline)
    return before, run(replace(family, call={**family.call, **arguments}))


def check(family, name, expected, ram):
    """Within a budget that is at work."""
    pipe, planned = family.pipeline, plan_of(family.pipeline)
    made = changed(family, name)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))
    assert planned.peak <= ram
    assert plan_of(pipe).peak <= ram
    attachments = [attachment_of(network) for network in modules_of(pipe).values()]
    assert all(has_all_parameters(attachment) for attachment in attachments if attachment is not None)
    unfit(pipe)
    assert all(attachment_of(network) is None for network in modules_of(pipe).values())
    assert torch.equal(run(replace(family, call={**family.call, **CHANGES[name][1]})), expected[1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_least", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["least", "plenty"])
def test_it_is_as_without_a_budget(name, is_least):
    expected = changed(stable_diffusion(), name)
    family = stable_diffusion()
    ram = least(family.pipeline, **family.call) + ROOM if is_least else 16 * 10**9
    fit(family.pipeline, ram=ram, **family.call)
    check(family, name, expected, ram)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_but(name, "a weight")) for name in CHANGES])
def test_so_is_one_that_was_loaded_within_it(name, tmp_path):
    expected = changed(saved_and_loaded(stable_diffusion(), tmp_path), name)
    family = stable_diffusion()
    ram = least(family.pipeline, **family.call) + ROOM
    loaded = lowtide.load(tmp_path, ram=ram, native=False, **family.call)
    loaded.set_progress_bar_config(disable=True)
    check(replace(family, pipeline=loaded), name, expected, ram)


def test_tiles_that_are_turned_on_by_hand_are_refused_and_not_lost():
    family = stable_diffusion(num_inference_steps=1)
    vae = family.pipeline.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    whole = run(family)
    vae.enable_tiling()
    in_tiles = run(family)
    assert not torch.equal(whole, in_tiles)
    fit(family.pipeline, ram="16GB", **family.call)  # tiles of before are put aside, and come back
    assert torch.equal(run(family), whole)
    unfit(family.pipeline)
    assert torch.equal(run(family), in_tiles)
    vae.disable_tiling()
    fit(family.pipeline, ram="16GB", **family.call)
    with pytest.raises(RuntimeError, match=r"vae\.enable_tiling and a budget are not possible together.*unfit\(pipe\)"):
        vae.enable_tiling()
    assert torch.equal(run(family), whole)
    vae.use_tiling = True
    with pytest.raises(RuntimeError, match=r"vae\.enable_tiling and a budget .* pipe\.vae\.disable_tiling\(\)"):
        run(family)
    vae.disable_tiling()
    assert torch.equal(run(family), whole)
    vae.use_tiling = True
    unfit(family.pipeline)
    assert torch.equal(run(family), in_tiles)


@pytest.mark.parametrize("casting", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*are in no file, so they keep:UserWarning")
def test_a_network_that_was_replaced_is_as_it_was_after_unfit(casting):
    family = stable_diffusion(num_inference_steps=1)
    pipe, unet, expected = family.pipeline, family.pipeline.unet, run(family)
    plan = fit(pipe, ram=least(pipe, **family.call) + ROOM, **family.call)
    if casting is not None:
        applied = guest_of(pipe).applied
        applied.put_to_work(
            applied.fit, replace(plan, components={**plan.components, "unet": ComponentPlan(casting=casting)})
        )
    assert is_cast(unet) == (casting is not None)
    assert (attachment_of(unet) is not None) == (casting is None)
    pipe.unet = another_unet()
    run(family)
    unfit(pipe)
    assert not is_cast(unet)
    assert not any("_lowtide" in name or "enable" in name for part in unet.modules() for name in vars(part))
    pipe.unet = unet
    assert torch.equal(run(family), expected) == (casting is None)


def test_a_network_that_was_replaced_is_not_kept_alive():
    family = stable_diffusion(num_inference_steps=1)
    fit(family.pipeline, ram=least(family.pipeline, **family.call) + ROOM, **family.call)
    run(family)
    replaced = weakref.ref(family.pipeline.unet)
    family.pipeline.unet = another_unet()
    run(family)
    gc.collect()
    assert replaced() is None


def test_copies_of_a_network_refuse_nothing():
    family = stable_diffusion()
    fit(family.pipeline, ram="16GB", **family.call)
    vae = family.pipeline.vae
    for made in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        made.enable_tiling()
        assert made.use_tiling
    other = family.pipeline.vae = parts.autoencoder()
    run(family)
    with pytest.raises(RuntimeError, match="enable_tiling and a budget"):
        other.enable_tiling()
    unfit(family.pipeline)
    assert not any("enable" in name for network in (vae, other) for name in vars(network))
    assert not any("_lowtide" in name for name in vars(other))


def test_a_compiled_network_is_refused_by_name():
    family = stable_diffusion(num_inference_steps=1)
    pipe, unet = family.pipeline, family.pipeline.unet
    expected = run(family)
    compiled = torch.compile(unet, backend="eager")
    pipe.unet = compiled
    with pytest.raises(ValueError, match=r"unet is compiled .*pipe\.unet = pipe\.unet\._orig_mod"):
        fit(pipe, ram="16GB", **family.call)
    pipe.unet = unet
    fit(pipe, ram="16GB", **family.call)
    pipe.unet = compiled
    with pytest.raises(ValueError, match="unet is compiled"):
        run(family)
    pipe.unet = compiled._orig_mod
    assert torch.equal(run(family), expected)
    unfit(pipe)
    assert torch.equal(run(family), expected)
