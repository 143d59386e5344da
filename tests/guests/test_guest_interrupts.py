"""Ctrl-C on the lines of a guest's call within a budget: the next call is as if it had not been pressed.

The lines of `lowtide.memory` are in `tests/memory/test_interrupts.py`.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.fitting.fits import RATES
from tests.guests.families import FAMILIES, run
from tests.guests.family import Family, modules_of
from tests.guests.guest_cases import WARNINGS, least
from tests.lines import Place, interrupted, places
from tests.memory.cases import all_at_rest

from lowtide.guests.doors import fit, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.machine.heap import MALLOC
from lowtide.memory import attachment_of
from lowtide.memory.placeholder import AtRest

pytest.importorskip("diffusers")
pytestmark = WARNINGS
PARTS = ("calls", "fitting", "guests", "pipelines/offloading", "pipelines/scheduler_claim", "stages")


@pytest.fixture(scope="module")
def kept() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lowtide.fitting.prepare._rates", lambda *_: replace(RATES, base=10**8))
        family = FAMILIES["Flux2 Klein"]()
        family = replace(family, call={**family.call, "num_inference_steps": 1})
        yield family, run(family), least(family.pipeline, **family.call)


@pytest.fixture
def flux(kept: Any) -> Any:
    family, expected, smallest = kept
    fit(family.pipeline, ram=smallest, **family.call)
    yield family, expected
    unfit(family.pipeline)
    check_plain(family, expected)


def check_plain(family: Family, expected: torch.Tensor) -> None:
    """Nothing of a budget is left."""
    for network in modules_of(family.pipeline).values():
        assert attachment_of(network) is None
        assert not any(isinstance(weight, AtRest) for weight in network.parameters())
        assert not any("_lowtide" in name for part in network.modules() for name in vars(part))
    assert torch.equal(run(family), expected)


def check_at_rest(family: Family, where: object) -> None:
    """No weight that streams is in memory, and nothing of the process is as a call has it."""
    for attachment in filter(None, map(attachment_of, modules_of(family.pipeline).values())):
        assert all_at_rest(attachment), str(where)
        assert attachment.stream.ledger.in_use <= attachment.bound, str(where)
    assert gc.isenabled(), str(where)
    assert torch.is_grad_enabled(), str(where)
    assert not MALLOC._wishes, str(where)
    assert not guest_of(family.pipeline).stages.watching, str(where)
    assert not guest_of(family.pipeline).call_lock._calls, str(where)


def cut_short(family: Family, expected: torch.Tensor, chosen: list[Place]) -> None:
    for place in chosen:
        assert interrupted(lambda: run(family), place), str(place)
        assert torch.equal(run(family), expected), str(place)
        check_at_rest(family, place)


def lines(family: Family) -> list[Place]:
    run(family)
    return places(lambda: run(family), PARTS)


def test_the_next_call_is_undisturbed(flux: Any) -> None:
    family, expected = flux
    cut_short(family, expected, lines(family)[3::40])
