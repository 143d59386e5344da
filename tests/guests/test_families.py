"""Every guest runs, repeats its bits, is the same when built anew, and survives a save where its class can."""

import functools

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of, saved_and_loaded

pytest.importorskip("diffusers")
pytestmark = [  # the peer's own warnings
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The default of `overwrite_modular_index`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
LARGEST = 650_000
"""Parameters of the largest networks, which norm in groups of 32 channels whatever their configuration."""


@functools.cache
def built(name):
    return FAMILIES[name]()


@functools.cache
def result(name):
    return run(built(name))


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    """The pipelines go with the tests of this file."""
    yield
    for kept in (built, result):
        kept.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_and_repeats_its_bits(name):
    first = result(name)
    assert first.isfinite().all()
    assert first.float().std() > 0.02, "a flat picture would show few faults"
    assert torch.equal(run(built(name)), first)
    assert not torch.equal(run(built(name), seed=1), first)  # the control: other noise, other bits


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_built_anew_it_has_the_same_weights(name):
    ours, anew = (modules_of(family.pipeline) for family in (built(name), FAMILIES[name]()))
    assert ours.keys() == anew.keys()
    for part, module in ours.items():
        weights, others = module.state_dict(), anew[part].state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
        assert not any(weight.requires_grad for weight in module.parameters())
        assert sum(weight.numel() for weight in module.parameters()) <= LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_by_its_own_class(name, tmp_path):
    if built(name).not_saved:
        with pytest.raises(ValueError, match=r"has no class|were passed"):
            saved_and_loaded(built(name), tmp_path)
        return
    assert torch.equal(run(saved_and_loaded(built(name), tmp_path)), result(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_repeated_block_counts(name):
    family = FAMILIES[name]()
    blocks = family.repeated()
    assert len(blocks) >= 2
    for block in blocks:
        before = [weight.clone() for weight in block.parameters()]
        for weight in block.parameters():
            weight.mul_(1.1)
        assert not torch.equal(run(family), result(name)), f"a {type(block).__name__} is silent"
        for weight, old in zip(block.parameters(), before, strict=True):
            weight.copy_(old)
