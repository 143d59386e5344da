"""What a fork leaves: threads that compute, locks, and all that is told of it though one of them breaks."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.forked import in_child
from torch import nn

from lowtide import forks
from lowtide.calls import Call, Calls
from lowtide.machine.heap import FRUGAL, MALLOC, Wish
from lowtide.measuring import peaks
from lowtide.memory.ledger import Ledger
from lowtide.pipelines import scheduler_claim

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture
def two_threads() -> Any:
    """PyTorch computes with two, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def large() -> torch.Tensor:
    """A kernel that PyTorch shares out among its threads."""
    torch.manual_seed(0)
    with torch.no_grad():
        return nn.Conv2d(32, 32, 3)(torch.randn(1, 32, 64, 64))


def test_a_child_computes_with_as_many_threads(two_threads: None) -> None:
    expected = large()
    assert torch.equal(in_child(large), expected)
    assert torch.equal(in_child(lambda: in_child(large)), expected)
    assert torch.equal(large(), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP, as PyTorch for Linux comes with it")
def test_with_the_threads_of_its_parent_a_child_hangs(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control."""
    large()
    monkeypatch.setattr("tests.forked.SECONDS", 2)
    monkeypatch.setattr(forks, "_gnu_openmp", set)
    with pytest.raises(AssertionError, match="ended with -14"):
        in_child(large)


class Broken:
    def after_fork(self) -> None:
        raise RuntimeError("broken")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_are_told_though_some_break() -> None:
    broken, calls = [Broken() for _ in range(50)], [Calls[Call]() for _ in range(50)]
    for thing in broken:
        forks.tell_of_forks(thing)
    under_way: list[Call] = []
    thread = threading.Thread(target=lambda: under_way.extend(Call() for _ in calls))
    thread.start()
    thread.join()
    for each, call in zip(calls, under_way, strict=True):
        each.begin(call)
    assert in_child(lambda: torch.tensor([len(each) for each in calls])).sum() == 0
    assert sum(map(len, calls)) == 50


def in_garbage(end: Callable[[], object]) -> None:
    """Have something ended by a collection of garbage, as the frame of an interrupted call is."""
    cycle: list[Any] = [type("Ended", (), {"__del__": lambda _: end()})()]
    cycle.append(cycle)


def once_claimed(scheduler: object) -> None:
    with scheduler_claim.claimed(scheduler):
        pass


LOCKED: dict[str, tuple[Callable[[], Any], Callable[[], object]]] = {
    "ledger": lambda: (ledger := Ledger(), ledger._lock, lambda: ledger.take(1))[1:],
    "heap": lambda: (MALLOC._lock, lambda: MALLOC.wish(Wish(), FRUGAL)),
    "scheduler": lambda: (scheduler_claim._lock, lambda: once_claimed(object())),
    "peaks": lambda: (peaks._MARKS._lock, peaks.PeakSource(None).take),
}


@pytest.mark.parametrize("name", LOCKED)
def test_a_collection_of_garbage_may_come_inside_a_lock(name: str) -> None:
    lock, use = LOCKED[name]()
    ended: list[int] = []

    def collect() -> None:
        in_garbage(lambda: (use(), ended.append(1)))
        with lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert ended
