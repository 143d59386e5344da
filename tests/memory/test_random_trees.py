"""Any module, any rule: random trees of modules, random rules, always the plain results under the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.memory.cases import Block, all_at_rest, own_bound, put, total
from torch import nn

from lowtide.memory import Level, Rule, Tier, detach

WIDTH = 8


class Around(nn.Module):
    """A module with parameters and a buffer of its own around others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.gain) + self.shift


class Attend(nn.Module):
    """Attention, whose code reads the weights of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recur(nn.Module):
    """A recurrent layer, which keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Tower(nn.Module):
    """A list of blocks, called one by one; some are left out or called twice."""

    def __init__(self, blocks: list[nn.Module], steps: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.steps = [step % len(blocks) for step in steps]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = torch.tanh(self.blocks[step](x))
        return x


LEAVES = st.sampled_from(["linear", "norm", "block", "tied block", "attend", "recur", "shared"])
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.tuples(st.just("around"), children),
        st.tuples(st.just("sequence"), st.lists(children, min_size=1, max_size=4)),
        st.tuples(
            st.just("tower"),
            st.lists(children, min_size=1, max_size=4),
            st.lists(st.integers(0, 9), min_size=1, max_size=6),
        ),
    ),
    max_leaves=8,
)
RULES = st.builds(
    Rule,
    level=st.sampled_from(list(Level)),
    rest=st.sampled_from([Tier.HOST, Tier.DISK]),
    blocks_per_group=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    resident_bytes=st.sampled_from([0, 500, 3000, 20_000]),
    host_bytes=st.sampled_from([None, None, 0, 2000]),
    spill=st.just(True),
)


MAKERS = {
    "linear": lambda _: nn.Linear(WIDTH, WIDTH),
    "norm": lambda _: nn.LayerNorm(WIDTH),
    "block": lambda _: Block(WIDTH),
    "tied block": lambda common: Block(
        WIDTH, common.setdefault("tied", nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 4))
    ),
    "attend": lambda _: Attend(),
    "recur": lambda _: Recur(),
    "shared": lambda common: common.setdefault("shared", Block(WIDTH)),
}


def build(tree, common: dict) -> nn.Module:
    if isinstance(tree, str):
        return MAKERS[tree](common)
    if tree[0] == "around":
        return Around(build(tree[1], common))
    members = [build(child, common) for child in tree[1]]
    return nn.Sequential(*members) if tree[0] == "sequence" else Tower(members, tree[2])


def by_bytes(rule: Rule) -> Rule:
    """The same with a limit in bytes: none, what a block or two take, or all."""
    return replace(rule, prefetch_bytes=(0, 2000, 10_000)[rule.blocks_per_group - 1])


def under_any_rules(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of so many trees."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        given_any = given(tree=TREES, rules=st.lists(RULES, min_size=1, max_size=3), zero_copy=st.booleans())
        checks = [HealthCheck.too_slow]
        return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)(
            given_any(test)
        )

    return decorate


@under_any_rules(50)
def test_any_tree_under_any_rules(tree, rules: list[Rule], *, zero_copy: bool) -> None:
    check(tree, rules, zero_copy=zero_copy)


@pytest.mark.slow
@under_any_rules(150)
def test_many_trees_under_any_rules(tree, rules: list[Rule], *, zero_copy: bool) -> None:
    check(tree, rules, zero_copy=zero_copy)


def check(tree, rules: list[Rule], *, zero_copy: bool) -> None:
    torch.manual_seed(0)
    module = build(tree, {}).eval()
    x = torch.randn(2, 3, WIDTH)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        expected = module(x)
        for rule in [*rules, *(by_bytes(rule) for rule in rules if rule.prefetch == 3)]:
            attachment = put(module, rule, zero_copy=zero_copy)
            for _ in range(2):
                assert torch.equal(module(x), expected)
                assert all_at_rest(attachment)
            ledger = attachment.stream.ledger
            assert ledger.peak <= attachment.bound <= own_bound(attachment)
            assert ledger.missed == 0
            resident = sum(w.nbytes for unit in attachment.units if unit.stays for w in unit.weights)
            assert resident <= min(rule.resident_bytes, total(module))
    detach(module)
    found = module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
