"""Guests within a budget whose calls are cut short, or come from elsewhere: the next call is as if nothing had been.

By Ctrl-C on the lines of a call, an exception of a callback, a pipeline's own `_interrupt`; from a callback, another
thread, and forked children.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.forked import Beside, Parked, in_child
from tests.guests.families import FAMILIES, run
from tests.guests.family import Family, modules_of
from tests.guests.guest_cases import WARNINGS, least
from tests.lines import Place, interrupted, line_of, places
from tests.memory.cases import all_at_rest

from lowtide.guests.doors import fit, unfit
from lowtide.guests.within_budget import guest_of
from lowtide.machine.heap import MALLOC
from lowtide.memory import attachment_of
from lowtide.memory.placeholder import AtRest

pytest.importorskip("diffusers")
pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("traced_once"),
]
PARTS = ("calls", "fitting", "guests", "pipelines/offloading", "pipelines/scheduler_claim", "stages")
BETWEEN_NETWORKS = line_of("guests/brackets.py", "stage.advance()")


@pytest.fixture(scope="module")
def kept() -> Any:
    family = FAMILIES["Flux2 Klein"]()
    family = replace(family, call={**family.call, "num_inference_steps": 1})
    two = {**family.call, "num_inference_steps": 2}
    return family, run(family), least(family.pipeline, **two)


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


@pytest.mark.slow
def test_on_every_line(flux: Any) -> None:
    family, expected = flux
    cut_short(family, expected, lines(family))


def halt_at_first(family: Family, how: Any) -> dict[str, Any]:
    """Arguments of a call of two steps, at the end of the first of which `how` is done."""

    def at_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            how(pipe)
        return tensors

    steps = {**family.call, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return {**steps, "callback_on_step_end": at_end}


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt,
        MemoryError,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (RuntimeError, SystemExit)),
    ],
)
def test_what_a_callback_raises_goes_on_its_way(flux: Any, error: type[BaseException]) -> None:
    family, expected = flux

    def fail(_: Any) -> None:
        raise error("of the callback")

    with pytest.raises(error, match="of the callback"):
        family.pipeline(**halt_at_first(family, fail))
    check_at_rest(family, error)
    assert torch.equal(run(family), expected)


def test_a_call_that_ends_itself_early_gives_what_it_gives_without_a_budget(flux: Any) -> None:
    family, expected = flux
    pipe = family.pipeline
    stopped = [pipe(**halt_at_first(family, lambda pipe: setattr(pipe, "_interrupt", True)))]
    assert torch.equal(run(family), expected)
    unfit(pipe)
    stopped.append(pipe(**halt_at_first(family, lambda pipe: setattr(pipe, "_interrupt", True))))
    assert torch.equal(*map(family.result, stopped))
    full = family.result(pipe(**halt_at_first(family, lambda _: None)))
    assert not torch.equal(family.result(stopped[0]), full)


def test_a_call_of_another_thread_waits(flux: Any) -> None:
    family, expected = flux
    with Parked(lambda: run(family), BETWEEN_NETWORKS) as parked:
        other = Beside(lambda: run(family))
        assert other.waits
    assert torch.equal(parked.result, expected)
    assert torch.equal(other.ended(), expected)


def test_a_call_of_another_thread_from_a_callback_waits_for_its_end(flux: Any) -> None:
    family, expected = flux
    others: list[Beside] = []

    def begin(_: Any) -> None:
        others.append(Beside(lambda: run(family)))
        assert others[0].waits

    family.pipeline(**halt_at_first(family, begin))
    assert torch.equal(others[0].ended(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestForks:
    def test_before_and_after_a_call_and_beside_one(self, flux: Any) -> None:
        family, expected = flux
        assert torch.equal(in_child(lambda: run(family)), expected)
        assert torch.equal(run(family), expected)
        assert torch.equal(in_child(lambda: twice(family)), expected)
        with Parked(lambda: run(family), BETWEEN_NETWORKS) as parked:
            assert torch.equal(in_child(lambda: twice(family)), expected)
        assert torch.equal(parked.result, expected)

    def test_from_a_callback(self, flux: Any) -> None:
        """In the child the call is still under way: it is refused there as here, and goes on."""
        family, expected = flux
        inside: list[torch.Tensor] = []

        def fork(pipe: Any) -> None:
            def refused() -> torch.Tensor:
                with pytest.raises(RuntimeError, match="is being called"):
                    run(family)
                return torch.ones(1)

            inside.append(in_child(refused))

        family.pipeline(**halt_at_first(family, fork))
        assert inside == [torch.ones(1)]
        assert torch.equal(run(family), expected)


def twice(family: Family) -> torch.Tensor:
    """Within the budget, and without."""
    first = run(family)
    unfit(family.pipeline)
    assert torch.equal(run(family), first)
    return first
