"""A block that several repeated blocks have inside: it is a unit of its own, which comes once in a call."""

from __future__ import annotations

import pytest
import torch
from tests.memory.cases import put
from tests.sim_tensor import simulated
from torch import nn

from lowtide.memory import Level, Rule, Tier, apply_residency
from lowtide.prediction.component import component

X = torch.randn(3, 16)


class Block(nn.Module):
    def __init__(self, shared: nn.Module, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(16, width)
        self.shared = shared
        self.after = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.after(self.before(self.shared(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*(Block(shared, 20 + place) for place in range(4)))).eval()


SHARED = "Sequential.1.0.shared.0.weight"


@pytest.mark.parametrize(("prefetch", "prefetch_bytes"), [(0, None), (1, None), (1, 7000)])
@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_it_comes_once_in_a_call(prefetch: int, prefetch_bytes: int | None, blocks_per_group: int) -> None:
    rule = Rule(
        Level.BLOCK,
        Tier.HOST,
        prefetch=prefetch,
        prefetch_bytes=prefetch_bytes,
        blocks_per_group=blocks_per_group,
    )
    module = network()
    with torch.no_grad():
        expected = module(X)
        attachment = put(module, rule)
        assert [unit.name for unit in attachment.units if unit.aside] == [SHARED]
        for _ in range(3):
            attachment.stream.ledger.reset()
            assert torch.equal(module(X), expected)
            assert attachment.stream.ledger.missed == 0
        assert all(unit.load is None for unit in attachment.units)


@pytest.mark.parametrize("early", [False, True])
def test_on_an_accelerator(*, early: bool) -> None:
    with simulated(early=early) as sim, torch.no_grad():
        module, device = network(), torch.device("sim", 1)
        expected = module(X)
        attachment = apply_residency(module, rest="host", level="block", device=device)
        for _ in range(2):
            module(X)
        copies = sim.of(device).counts.copies
        assert torch.equal(module(X).cpu(), expected)
        assert sim.of(device).counts.copies - copies == len(attachment.units) + 1, "and the input"
        assert attachment.stream.ledger.peak <= attachment.bound


def test_it_is_the_unit_that_plans_count() -> None:
    module = network()
    planned = component("net", module, device="cuda").units[Level.BLOCK]
    attachment = put(module, Rule(Level.BLOCK, Tier.HOST))
    assert [(unit.name, unit.aside) for unit in planned] == [(unit.name, unit.aside) for unit in attachment.units]
    assert len(planned) == 6


def test_named_blocks_inside_named_blocks_are_no_such() -> None:
    module = network()
    rule = Rule(Level.BLOCK, Tier.HOST, block_modules=("1.1", "1.1.after"))
    with torch.no_grad():
        expected = module(X)
        attachment = put(module, rule)
        assert not any(unit.recurs for unit in attachment.units)
        assert torch.equal(module(X), expected)
