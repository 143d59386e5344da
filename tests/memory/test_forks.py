"""A child forked at any moment of any thread: it computes as its parent does, under every rule."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests.forked import Parked, in_child, received, send
from tests.lines import Place, places
from tests.memory.cases import CPU, RULES, all_at_rest, toy
from tests.memory.ruled import CASES, Ruled, expected, is_bounded, lines, lines_once, made
from tests.thinned import thinned

from lowtide import forks
from lowtide.memory import detach
from lowtide.memory.attach import attach
from lowtide.memory.stream import Stream

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def in_order(module: Any, attachment: Any) -> Callable[[], torch.Tensor]:
    """Two calls in a child, where all is at rest afterwards."""

    def call() -> torch.Tensor:
        first = module.run()
        assert torch.equal(module.run(), first)
        assert all_at_rest(attachment)
        assert is_bounded(attachment)
        return first

    return call


@pytest.mark.parametrize(("rule", "zero_copy"), thinned(RULES, [True, False]))
def test_before_and_after_a_first_call(rule: str, *, zero_copy: bool) -> None:
    case = Ruled(rule, zero_copy)
    module, attachment = made(case)
    assert torch.equal(in_child(in_order(module, attachment)), expected(case))
    assert torch.equal(module.run(), expected(case))
    assert torch.equal(in_child(in_order(module, attachment)), expected(case))
    assert torch.equal(module.run(), expected(case))
    assert all_at_rest(attachment)


def test_a_child_of_a_child() -> None:
    case = Ruled("leaves ahead")
    module, attachment = made(case)
    assert torch.equal(in_child(lambda: in_child(in_order(module, attachment))), expected(case))


@pytest.mark.parametrize("every", [100, pytest.param(20, marks=pytest.mark.slow)])
def test_while_another_thread_is_at_a_line(every: int) -> None:
    for case, chosen in lines_once().items():
        check(case, chosen[::every])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_while_another_thread_is_at_any_line(case: Ruled) -> None:
    check(case, lines(case))


def check(case: Ruled, chosen: Iterable[Place]) -> None:
    """Fork while another thread is at a line of a call, which goes on in the parent alone."""
    module, attachment = made(case)
    for place in chosen:
        module.run()
        parked = fork_beside(place, module, attachment, case)
        if not parked.has_come:  # a line of first calls
            module, attachment = made(case)
            parked = fork_beside(place, module, attachment, case)
        assert parked.has_come, str(place)
        assert all_at_rest(attachment)


def fork_beside(place: Place, module: Any, attachment: Any, case: Ruled) -> Parked:
    with Parked(module.run, place) as parked:
        if parked.has_come:
            assert torch.equal(in_child(in_order(module, attachment)), expected(case)), str(place)
    assert torch.equal(parked.result, expected(case)), str(place)
    return parked


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_at_any_moment_of_another_thread(case: Ruled) -> None:
    module, attachment = made(case)
    is_over, wrong = threading.Event(), []

    def again_and_again() -> None:
        while not is_over.is_set():
            wrong.extend([] if torch.equal(module.run(), expected(case)) else ["wrong"])

    thread = threading.Thread(target=again_and_again)
    thread.start()
    try:
        for _ in range(4):
            assert torch.equal(in_child(in_order(module, attachment)), expected(case))
    finally:
        is_over.set()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("case", CASES[1::6], ids=str)
def test_from_inside_a_call_which_goes_on_in_both(case: Ruled) -> None:
    module, attachment = made(case)
    children: list[tuple[int, int]] = []

    def fork(*_: Any) -> None:
        handle.remove()
        receiving, sending = os.pipe()
        child = os.fork()
        os.close(sending if child else receiving)
        children.append((child, receiving if child else sending))

    for _ in range(2):
        handle = module.module.blocks[2].register_forward_hook(fork)
        result = module.run()
        child, pipe = children.pop()
        if child == 0:
            send(lambda: result, pipe)  # noqa: B023
        assert torch.equal(result, expected(case))
        assert torch.equal(received(pipe, child), expected(case))
        assert all_at_rest(attachment)


def test_what_another_module_of_the_stream_had_does_not_stay() -> None:
    """The other thread is in the middle of one module, and the child calls another one of the same stream."""
    rule = RULES["leaves ahead"]
    one, other = toy(torch.float32), toy(torch.float32)
    stream = Stream(CPU, prefetch=rule.prefetch, zero_copy=False)
    attachments = [attach(case.module, rule, stream) for case in (one, other)]
    expected = [case.run() for case in (one, other)]

    def call() -> torch.Tensor:
        stream.ledger.reset()
        result = other.run()
        assert stream.ledger.peak <= stream.bound
        assert all(all_at_rest(attachment) for attachment in attachments)
        return result

    place = next(place for place in lines(Ruled("leaves ahead", False)) if "out_of_buffers(call" in place.source)
    with Parked(one.run, place) as parked:
        assert torch.equal(in_child(call), expected[1])
    assert torch.equal(parked.result, expected[0])


@pytest.mark.parametrize("every", [8, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [Ruled("leaves ahead"), CASES[-1]], ids=str)
def test_while_another_thread_has_emptied_slots(case: Ruled, every: int) -> None:
    """As it does where a rule, or a casting, follows a change of the module."""
    module, _ = made(case)
    example, _ = made(case)
    for place in places(lambda: example.module.to(torch.float32), ("weights/slots",))[::every]:
        with Parked(lambda: module.module.to(torch.float32), place) as parked:
            assert parked.has_come, str(place)
            assert torch.equal(in_child(module.run), expected(case)), str(place)
        assert torch.equal(module.run(), expected(case)), str(place)


def test_a_rule_ends_in_a_child_too() -> None:
    case = Ruled("leaves ahead")
    module, _ = made(case)
    module.run()

    def end() -> torch.Tensor:
        detach(module.module)
        return module.run()

    assert torch.equal(in_child(end), expected(case))
    with Parked(module.run, next(place for place in lines(case) if "out_of_buffers(call" in place.source)):
        assert torch.equal(in_child(end), expected(case))


def test_without_beginning_anew_a_child_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with the reader of its parent nothing ever comes."""
    module, _ = made(Ruled("leaves ahead"))
    module.run()
    monkeypatch.setattr("tests.forked.SECONDS", 1)
    monkeypatch.setattr(forks, "_others", set())
    with pytest.raises(AssertionError, match="ended with -14"):
        in_child(module.run)
