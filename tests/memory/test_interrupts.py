"""Ctrl-C on every line that a call goes through: the next call is as if it had not been pressed.

Lines of clean-up are among them: what an interrupt leaves undone there is done at the beginning of the next call. Left
out is what cannot happen: an interrupt between the block of a lock and its release, see `Place.is_possible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import pytest
import torch
from tests.lines import Place, at_lines_of, interrupted, places
from tests.memory.cases import Case, all_at_rest
from tests.memory.ruled import CASES, Ruled, expected, is_bounded, lines, lines_once, made, ruled_again

from lowtide.memory import detach
from lowtide.memory.placeholder import AtRest


def test_on_each_line_once() -> None:
    for case, chosen in lines_once().items():
        check(case, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_every_line_under_every_rule(case: Ruled) -> None:
    check(case, lines(case))


def check(case: Ruled, chosen: Iterable[Place]) -> None:
    """Interrupt one call after another of one module."""
    module, attachment = made(case)
    assert torch.equal(module.run(), expected(case))
    for place in chosen:
        if not interrupted(module.run, place):  # a line of first calls
            module, attachment = made(case)
            assert interrupted(module.run, place), f"{case}: no call comes to {place}"
        assert torch.equal(module.run(), expected(case)), f"{case}, {place}"
        assert all_at_rest(attachment), f"{case}, {place}"
        assert is_bounded(attachment), f"{case}, {place}"
    detach(module.module)
    if not case.is_cast:
        assert not any(isinstance(parameter, AtRest) for parameter in module.module.parameters())
    assert torch.equal(module.run(), expected(case))


@pytest.mark.parametrize("case", [Ruled("model", zero_copy=False), Ruled("leaves ahead", zero_copy=False)], ids=str)
def test_while_modules_are_held(case: Ruled) -> None:
    """As they are in the call of a pipeline: the books are right afterwards, and right in the next call."""
    module, attachment = made(case)
    ledger, ring = attachment.stream.ledger, attachment.stream._ring

    def held() -> torch.Tensor:
        with attachment.stream.held():
            return module.run()

    assert torch.equal(held(), expected(case))
    for place in places(held, ("memory/stream", "memory/ring", "memory/ledger"))[::2]:
        assert interrupted(held, place), str(place)
        ledger.reset()
        assert torch.equal(held(), expected(case)), str(place)
        assert all_at_rest(attachment), str(place)
        assert ledger.in_use == ring.held == 0, str(place)
        assert ledger.peak <= attachment.bound, str(place)


def test_gradients_stay_on() -> None:
    """The ends of PyTorch's modes are Python code: where an interrupt comes into one, it ends late, or never."""
    assert not off_after(lambda: made(Ruled("leaves ahead", zero_copy=False))[0])
    assert off_after(lambda: Case(torch.nn.Linear(1, 1), in_a_mode)), "a control"


def in_a_mode(module: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return module(torch.ones(1, 1))


def off_after(anew: Callable[[], Case]) -> list[int]:
    """The lines of PyTorch's modes after which an interrupted call leaves gradients off."""
    file, lines, off = torch.autograd.grad_mode.__file__, dict[int, None](), list[int]()

    def call(case: Case) -> torch.Tensor:
        torch._C._set_grad_enabled(False)
        try:
            return case.call(case.module)
        finally:
            torch._C._set_grad_enabled(True)

    at_lines_of(file, lambda: call(anew()), lines.setdefault)
    for line in lines:
        case = anew()

        def at(now: int, line: int = line) -> None:
            if now == line:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            at_lines_of(file, lambda case=case: call(case), at)
        off.extend([] if torch.is_grad_enabled() else [line])
        torch._C._set_grad_enabled(True)
    return off


CHANGES: dict[str, Callable[[Case, Ruled], object]] = {
    "attached": ruled_again,
    "detached": lambda module, _: detach(module.module),
    "of another dtype": lambda module, _: module.module.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_while_a_module_is(change: str) -> None:
    changed_at(Ruled("leaves ahead"), change, every=16)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Ruled("leaves ahead"), Ruled("model", zero_copy=False), CASES[-1]], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_on_every_line_while_a_module_is(change: str, case: Ruled) -> None:
    changed_at(case, change, every=1)


def changed_at(case: Ruled, change: str, *, every: int) -> None:
    """Interrupt a change: the module computes the same, and its rule, if it is still at work, can be ended."""
    example, _ = made(case)
    for place in places(lambda: CHANGES[change](example, case))[::every]:
        module, _ = made(case)
        interrupted(lambda module=module: CHANGES[change](module, case), place)
        if change == "of another dtype":
            module.module.to(torch.float32)  # all of it, for parts may have come so far
        assert torch.equal(module.run(), expected(case)), str(place)
        detach(module.module)
        if not case.is_cast:
            assert not any(isinstance(parameter, AtRest) for parameter in module.module.parameters()), str(place)
        assert torch.equal(module.run(), expected(case)), str(place)
