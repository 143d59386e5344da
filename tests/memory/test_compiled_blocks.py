"""Blocks compiled with `torch.compile` before a rule comes: they are units, and stay compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.memory.cases import put
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.cast_leaf import leaves
from lowtide.casting.casting import Casting
from lowtide.memory import Level, Rule, Tier, detach
from lowtide.prediction.component import component

X = torch.randn(3, 16)


class Compiler:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield Compiler()


def blocks() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(4)]
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*block)).eval()


def network(compiler: Compiler) -> nn.Module:
    module: Any = blocks()
    for place, block in enumerate(module[1]):
        module[1][place] = torch.compile(block, backend=compiler)
    return module


@pytest.mark.parametrize("level", Level)
def test_they_are_compiled_once(compiler: Compiler, level: Level) -> None:
    module = network(compiler)
    expected = module(X)
    assert compiler.graphs == 1
    attachment = put(module, Rule(level, Tier.HOST, prefetch=0 if level is Level.WHOLE else 1))
    for _ in range(2):
        assert torch.equal(module(X), expected)
    assert len(attachment.units) == (1 if level is Level.WHOLE else 5)
    seen = compiler.graphs
    for _ in range(3):
        assert torch.equal(module(X), expected)
    assert compiler.graphs == seen <= 3, "no graph is given up in later steps"
    detach(module)
    assert torch.equal(module(X), expected)


def test_they_are_the_units_that_plans_count(compiler: Compiler) -> None:
    module = network(compiler)
    part = component("net", module, device="cuda")
    for level in (Level.BLOCK, Level.LEAF):
        attachment = put(module, Rule(level, Tier.HOST))
        assert [unit.name for unit in attachment.units] == [unit.name for unit in part.units[level]]
        assert all(type(unit.modules[0]).__name__ == "OptimizedModule" for unit in attachment.units[1:])


def test_a_compiled_block_in_8_bits_is_dequantized_as_one(compiler: Compiler) -> None:
    plain, module = blocks(), network(compiler)
    for one in (plain, module):
        apply_casting(one, Casting("int8"))
    expected = plain(X)
    assert len(leaves(module)) == 5
    put(module, Rule(Level.BLOCK, Tier.HOST))
    for _ in range(3):
        assert torch.equal(module(X), expected)
    assert compiler.graphs <= 2


def test_a_compiled_network_is_split_all_the_same(compiler: Compiler) -> None:
    compiled: Any = torch.compile(blocks(), backend=compiler)
    expected = blocks()(X)
    attachment = put(compiled, Rule(Level.BLOCK, Tier.HOST))
    assert len(attachment.units) == 5
    assert torch.equal(compiled(X), expected)


def test_blocks_that_are_compiled_in_place_are_refused_by_name(compiler: Compiler) -> None:
    module: Any = blocks()
    module[1][2].compile(backend=compiler)
    with pytest.raises(ValueError, match=r"'1\.2' of Sequential is compiled.* Offload it first"):
        put(module, Rule(Level.BLOCK, Tier.HOST))
