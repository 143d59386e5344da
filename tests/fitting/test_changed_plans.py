"""A plan put to work in place of another, with and without 8 bits: cut short anywhere, the next one is undisturbed.

By Ctrl-C, or in a child that is forked while another thread does so. A call of another size puts a plan to work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.forked import Parked, in_child
from tests.lines import Place, interrupted, places
from torch import nn

from lowtide.fitting.applied_plan import AppliedPlan, Before
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.plan import ComponentPlan
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

LEAVES = Rule(Level.LEAF, Tier.DISK)
PLANS = {
    "resident": ComponentPlan(),
    "leaves": ComponentPlan(LEAVES),
    "8 bits": ComponentPlan(casting="int8"),
    "leaves in 8 bits": ComponentPlan(LEAVES, casting="int8"),
}
CHANGES = [
    ("resident", "leaves in 8 bits"),
    ("leaves in 8 bits", "resident"),
    ("leaves", "8 bits"),
    ("8 bits", "leaves in 8 bits"),
]


class Subject:
    """One small network in a file."""

    def __init__(self, file: Path) -> None:
        with torch.device("meta"):
            self.network = network()
        fill(self.network, read_index(file))
        self.applied = AppliedPlan(self, FIT, plan("resident"), Before.of(self))  # type: ignore[arg-type]

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def ways(self) -> dict[str, Any]:
        return {}

    def put(self, name: str) -> None:
        self.applied.put_to_work(FIT, plan(name))

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.network(tiny.numbers((2, 16)))


FIT: Any = SimpleNamespace(meta=None, device=torch.device("cpu"))


def plan(name: str) -> Any:
    return SimpleNamespace(components={"network": PLANS[name]})


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("network") / "network.safetensors"
    save_file(tiny.set_weights(network()).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def expected(file: Path) -> dict[str, torch.Tensor]:
    """What every plan computes: exactly the same but for 8 bits."""
    found: dict[str, torch.Tensor] = {}
    for name in PLANS:
        subject = Subject(file)
        subject.put(name)
        found[name] = subject.run()
    assert torch.equal(found["resident"], found["leaves"])
    assert torch.equal(found["8 bits"], found["leaves in 8 bits"])
    assert not torch.equal(found["resident"], found["8 bits"])
    return found


def chosen(file: Path, before: str, after: str, *, every: int) -> list[Place]:
    """Lines of a change, among them the plan's own; none of those that the end of a tensor comes to, in any call."""
    subject = Subject(file)
    subject.put(before)
    found = places(lambda: subject.put(after))
    found = [place for place in found if "lambda _:" not in place.source]
    own = [place for place in found if place.file == "fitting/applied_plan.py"]
    return list(dict.fromkeys([*(own if every == 1 else own[3 :: (every + 9) // 5]), *found[every // 2 :: every]]))


def check(subject: Subject, name: str, expected: dict[str, torch.Tensor]) -> None:
    subject.put(name)
    assert torch.equal(subject.run(), expected[name])


def each(file: Path, expected: dict[str, torch.Tensor], every: int, cut: Callable[[Subject, str, Place], None]) -> None:
    for before, after in CHANGES:
        for number, place in enumerate(chosen(file, before, after, every=every)):
            subject = Subject(file)
            subject.put(before)
            try:
                cut(subject, after, place)
                check(subject, (before, after)[number % 2], expected)
                check(subject, "resident", expected)
            except Exception as error:
                raise AssertionError(f"{before} to {after}: {place}") from error


def by_interrupt(subject: Subject, after: str, place: Place) -> None:
    assert interrupted(lambda: subject.put(after), place), str(place)


def by_fork(subject: Subject, after: str, place: Place, expected: dict[str, torch.Tensor]) -> None:
    def then() -> torch.Tensor:
        check(subject, after, expected)
        check(subject, "resident", expected)
        return subject.run()

    with Parked(lambda: subject.put(after), place) as parked:
        assert parked.has_come, str(place)
        assert torch.equal(in_child(then), expected["resident"]), str(place)


def test_by_an_interrupt(file: Path, expected: dict[str, torch.Tensor]) -> None:
    each(file, expected, 30, by_interrupt)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_child(file: Path, expected: dict[str, torch.Tensor]) -> None:
    each(file, expected, 120, lambda subject, after, place: by_fork(subject, after, place, expected))


@pytest.mark.slow
def test_by_an_interrupt_at_every_line(file: Path, expected: dict[str, torch.Tensor]) -> None:
    each(file, expected, 1, by_interrupt)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_child_at_every_line(file: Path, expected: dict[str, torch.Tensor]) -> None:
    each(file, expected, 1, lambda subject, after, place: by_fork(subject, after, place, expected))
