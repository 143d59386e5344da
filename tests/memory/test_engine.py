"""Every rule on every kind of module: equal results, bytes under the bound, everything at rest afterwards, undone."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from tests.memory.cases import CASES, DTYPES, RULES, Case, all_at_rest, own_bound, plain, put, total
from tests.thinned import covering, thinned

from lowtide.memory import Rule, apply_residency, attachment_of, detach
from lowtide.memory.read_only import ReadOnly
from lowtide.memory.rule import Level, Tier

ALIKE = dict.fromkeys(["pairs of blocks ahead", "leaves three ahead", "blocks", "blocks on the host"], pytest.mark.slow)
"""Rules of which others differ in little."""
OF_THE_RING = ["sequential", "model", "blocks ahead", "pairs of blocks ahead", "leaves three ahead"]


def check(case: Case, name: str, dtype: str, rule: Rule, *, zero_copy: bool = True) -> None:
    attachment = put(case.module, rule, zero_copy=zero_copy)
    for _ in range(3):
        assert torch.equal(case.run(), plain(name, dtype))
        assert all_at_rest(attachment)
    ledger = attachment.stream.ledger
    assert ledger.peak <= attachment.bound <= own_bound(attachment)
    assert ledger.missed == 0, "no weight was asked for outside its call"


@pytest.mark.parametrize(("dtype", "name", "rule"), thinned(DTYPES, CASES, RULES))
def test_equal_bounded_and_at_rest(name: str, dtype: str, rule: str) -> None:
    check(CASES[name](DTYPES[dtype]), name, dtype, RULES[rule])


@pytest.mark.parametrize(("dtype", "name", "rule"), thinned(DTYPES, CASES, OF_THE_RING))
def test_equal_through_the_ring(name: str, dtype: str, rule: str) -> None:
    check(CASES[name](DTYPES[dtype]), name, dtype, RULES[rule], zero_copy=False)


@pytest.mark.parametrize(("zero_copy", "name", "share"), thinned([True, False], CASES, [0.25, 0.5, 0.75, 1.0]))
def test_partial_residency(name: str, share: float, *, zero_copy: bool) -> None:
    case = CASES[name](torch.float32)
    rule = Rule(Level.BLOCK, Tier.DISK, resident_bytes=int(share * total(case.module)), spill=True)
    check(case, name, "fp32", rule, zero_copy=zero_copy)


def test_the_ring_is_small_beside_the_module_and_reaches_its_bound() -> None:
    """A control: half the bound would be exceeded, and the bound is far from the whole."""
    case = CASES["unet"](torch.float32)
    attachment = put(case.module, RULES["blocks ahead"], zero_copy=False)
    case.run()
    case.run()
    assert attachment.bound / 2 < attachment.stream.ledger.peak <= attachment.bound < total(case.module) / 2


def test_a_wrong_weight_would_be_seen() -> None:
    """A control: two weights of one size, exchanged."""
    case = CASES["clip"](torch.float32)
    attachment = put(case.module, RULES["leaves ahead"])
    norms = [weight for unit in attachment.units for weight in unit.weights if weight.name.endswith("norm1.bias")]
    norms[0].rest, norms[1].rest = norms[1].rest, norms[0].rest
    assert not torch.equal(case.run(), plain("clip", "fp32"))


def test_resident_units_are_spread_evenly() -> None:
    case = CASES["peer transformer"](torch.float32)
    blocks = len(case.module.transformer_blocks)
    attachment = apply_residency(case.module, total(case.module) // 2, rest="host", device="cpu")
    stays = [unit.stays for unit in attachment.units if "transformer_blocks" in unit.name]
    assert len(stays) == blocks == 3
    assert stays in ([False, True, False], [True, False, True], [False, True, True], [False, False, True])
    assert sum(w.nbytes for u in attachment.units if u.stays for w in u.weights) <= total(case.module) // 2


@pytest.mark.parametrize("name", ["toy", "t5", "vae", pytest.param("unet", marks=pytest.mark.slow)])
def test_any_plan_after_any_other(name: str) -> None:
    case = CASES[name](torch.float32)
    plans = ["sequential", "model", "blocks ahead", "leaves ahead", "blocks on the host", "half on the host"]
    for before, after in itertools.product(plans, plans):
        put(case.module, RULES[before])
        put(case.module, RULES[after], zero_copy=before != "model")
        assert torch.equal(case.run(), plain(name, "fp32")), (before, after)
    detach(case.module)
    assert torch.equal(case.run(), plain(name, "fp32"))


@pytest.mark.parametrize(
    ("name", "rule"), thinned(CASES, ["sequential", "model", "blocks ahead", "blocks on the host"])
)
def test_undone(name: str, rule: str) -> None:
    case = CASES[name](torch.bfloat16)
    before = {key: (t.dtype, t.stride(), t.requires_grad, type(t)) for key, t in named(case.module)}
    keys = {key: set(module.__dict__) for key, module in case.module.named_modules()}
    state = {key: value.clone() for key, value in case.module.state_dict().items()}
    put(case.module, RULES[rule])
    case.run()
    detach(case.module)
    assert {key: (t.dtype, t.stride(), t.requires_grad, type(t)) for key, t in named(case.module)} == before
    assert {key: set(module.__dict__) for key, module in case.module.named_modules()} == keys
    assert same(case.module.state_dict(), state)
    assert torch.equal(case.run(), plain(name, "bf16"))


def test_ties_stay_ties() -> None:
    case = CASES["toy"](torch.float32)
    names = [key for key, _ in case.module.named_parameters()]
    for rule in RULES.values():
        put(case.module, rule)
        assert [key for key, _ in case.module.named_parameters()] == names
        assert case.module.head.weight is case.module.embed.weight
    twin = copy.deepcopy(case.module)
    assert twin.head.weight is twin.embed.weight
    assert twin.blocks[1].down.weight is twin.blocks[3].down.weight
    detach(case.module)
    assert case.module.head.weight is case.module.embed.weight


@pytest.mark.parametrize(("rule", "name"), covering(RULES, ["toy", "unet", "clip"]))
def test_state_copies_and_conversions_under_a_plan(name: str, rule: str) -> None:
    case = CASES[name](torch.float32)
    expected, state = plain(name, "fp32"), {k: v.clone() for k, v in case.module.state_dict().items()}
    put(case.module, RULES[rule])
    assert same(case.module.state_dict(), state)
    assert all(type(tensor) in (torch.Tensor, ReadOnly) for tensor in case.module.state_dict().values())
    assert {(p.device.type, p.dtype) for p in case.module.parameters()} == {("cpu", torch.float32)}
    twin = copy.deepcopy(case.module)
    assert attachment_of(twin) is None
    assert torch.equal(Case(twin, case.call).run(), expected)
    stream = io.BytesIO()
    torch.save(case.module, stream)
    stream.seek(0)
    assert torch.equal(Case(torch.load(stream, weights_only=False), case.call).run(), expected)

    doubled = {k: v * 2 if v.is_floating_point() else v for k, v in state.items()}
    case.module.load_state_dict(doubled)
    assert attachment_of(case.module) is not None
    assert same(case.module.state_dict(), doubled)
    twin.load_state_dict(doubled)
    assert torch.equal(case.run(), Case(twin, case.call).run())
    case.module.load_state_dict(state)
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=ALIKE.get(rule, ())) for rule in RULES])
def test_other_dtypes_and_layouts_under_a_plan(rule: str) -> None:
    case = CASES["unet"](torch.float32)
    put(case.module, RULES[rule])
    case.module.to(torch.bfloat16)
    assert case.module.dtype == torch.bfloat16
    assert attachment_of(case.module) is not None
    other = Case(case.module, CASES["unet"](torch.bfloat16).call)
    assert torch.equal(other.run(), plain("unet", "bf16"))

    last = CASES["unet"](torch.float32)
    last.module.to(memory_format=torch.channels_last)
    expected = last.run()
    put(last.module, RULES[rule], zero_copy=False)
    assert last.module.conv_out.weight.stride() == last.module.conv_out.state_dict()["weight"].stride()
    assert last.module.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.run(), expected)
    moved = CASES["unet"](torch.float32)
    put(moved.module, RULES[rule])
    moved.module.to(memory_format=torch.channels_last)
    assert torch.equal(moved.run(), expected)


def test_buffers_that_a_module_writes_are_kept() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            self.last = x[0] * 2
            return self.norm(x) * self.seen + self.last

    x = torch.randn(5, 4)
    for zero_copy, rule in itertools.product((True, False), RULES.values()):
        ours, theirs = Counter(), Counter()
        put(ours, rule, zero_copy=zero_copy)
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(ours(x), theirs(x))
        detach(ours)
        assert same(ours.state_dict(), theirs.state_dict())


def test_a_weight_read_by_another_module_is_loaded_for_that_operation() -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.one(x), self.two.weight) + self.two(x)

    module, x = Reader(), torch.randn(2, 4)
    with torch.no_grad():
        expected = module(x)
        attachment = put(module, RULES["leaves ahead"])
        assert torch.equal(module(x), expected)
    assert attachment.stream.ledger.missed == 1


def named(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
