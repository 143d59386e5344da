"""What the units of a module are, and what is known of their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from tests.memory.cases import CASES, Toy, put
from torch import nn

from lowtide.memory import Level, Rule, Tier
from lowtide.memory.blocks import blocks_of
from lowtide.memory.order import Order


def names(module: nn.Module) -> list[list[str]]:
    known = {id(inner): name for name, inner in module.named_modules()}
    return [[known[id(block)] for block in blocks] for blocks in blocks_of(module)]


def test_blocks_are_found_where_they_are_nested() -> None:
    assert names(CASES["t5"](torch.float32).module) == [[f"encoder.block.{n}" for n in range(3)]]
    clip = names(CASES["clip"](torch.float32).module)
    assert len(clip) == 1
    assert [name.rsplit(".", 1)[1] for name in clip[0]] == ["0", "1"]
    unet = names(tiny.unet())
    assert ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"] in unet
    assert ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2"] in unet
    assert ["mid_block.resnets.0", "mid_block.resnets.1"] in unet
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == [], "leaves are units anyway"


def test_lists_that_are_never_called_are_no_blocks() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for one, two in self.pairs:
                x = two(one(x))
            return x

    module, x = Pairs(), torch.randn(1, 2)
    with torch.no_grad():
        expected = module(x)
        attachment = put(module, Rule(Level.BLOCK, Tier.DISK, spill=True))
        assert torch.equal(module(x), expected)
    assert attachment.stream.ledger.missed == 0
    assert len(attachment.units) == 6


def test_named_blocks() -> None:
    module = tiny.unet()
    rule = Rule(Level.BLOCK, Tier.DISK, block_modules=("down_blocks", "mid_block"), spill=True)
    called = {id(inner) for unit in put(module, rule).units for inner in unit.modules}
    triggers = {name for name, inner in module.named_modules() if id(inner) in called}
    assert {"down_blocks.0", "down_blocks.3", "mid_block", "conv_in"} <= triggers
    assert not any(name.startswith("down_blocks.0.") for name in triggers)
    with pytest.raises(ValueError, match=r"no module 'blocks'.*down_blocks"):
        put(module, Rule(block_modules=("blocks",)))


def test_every_weight_is_in_one_unit_and_ties_in_one_weight() -> None:
    module = Toy()
    for level in Level:
        attachment = put(module, Rule(level, Tier.DISK, spill=True))
        weights = [weight for unit in attachment.units for weight in unit.weights]
        slots = sorted(view.slot.name for weight in weights for view in weight.views)
        expected = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        expected += [n for n, _ in module.named_buffers(remove_duplicate=False)]
        assert slots == sorted(expected)
        tied = {tuple(sorted(v.slot.name for v in w.views)) for w in weights if len(w.views) > 1}
        assert ("embed.weight", "head.weight") in tied
        assert ("blocks.1.down.weight", "blocks.3.down.weight") in tied


def test_order_learns_from_a_whole_run_alone() -> None:
    order: Order[object] = Order()
    a, b, c = object(), object(), object()
    order.entered(a)
    assert order.upcoming(2) == []
    order.abandoned()
    for unit in (a, b, c):
        order.entered(unit)
    order.finished()
    assert order.upcoming(2) == [a, b]
    order.entered(a)
    assert order.upcoming(2) == [b, c]
    order.entered(c)
    assert order.upcoming(2) == [a, b], "circular, and a unit left out is left out"
    order.abandoned()
    assert order.upcoming(1) == [a], "a run cut short teaches nothing"


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.integers(0, 6))
def test_order_foresees_a_repeated_run(units: list[str], count: int) -> None:
    order: Order[str] = Order()
    for _ in range(2):
        for place, unit in enumerate(units):
            order.entered(unit)
            if order.upcoming(1):
                coming = order.upcoming(count)
                assert len(coming) == len(set(coming)) == min(count, len(set(units)))
                assert order.upcoming(1) == [units[(place + 1) % len(units)]]
        order.finished()
