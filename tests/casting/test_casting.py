"""Casting against weights that were rounded beforehand: the same bits, under every rule and whatever is done to it."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import random
import re
import signal
import warnings
import weakref

import pytest
import torch
from tests.memory.cases import CASES, DTYPES, RULES, plain, put
from tests.thinned import covering, thinned
from torch import nn

from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.cast_leaf import leaves
from lowtide.casting.cast_module import CASTABLE
from lowtide.casting.cast_weight import small_of
from lowtide.casting.casting import NEVER_CAST, Casting
from lowtide.memory import attachment_of, detach
from lowtide.memory.placeholder import AtRest
from lowtide.memory.read_only import ReadOnly

CASTINGS = {
    "e4m3": Casting("float8_e4m3fn"),
    "e5m2": Casting("float8_e5m2"),
    "e4m3 scaled": Casting("float8_e4m3fn", scaled=True),
    "e5m2 scaled": Casting("float8_e5m2", scaled=True),
    "int8": Casting("int8"),
}
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def rounded(weight: torch.Tensor, casting: Casting, dim: int = 0) -> torch.Tensor:
    """What 8 bits hold of a weight, written down once more, plainly."""
    w = weight.detach().double()
    if not casting.scaled:
        return weight.detach().to(getattr(torch, casting.storage)).to(weight.dtype)
    largest = w.abs().amax([d for d in range(w.dim()) if d != dim], keepdim=True)
    if casting.storage == "int8":
        scale = (largest.float() / 127 * (1 + 1 / 256)).bfloat16().double()
        q = (w.float() / scale.float()).round().double()
        assert q.abs().max() <= 127
    else:
        scale = 2.0 ** (torch.floor(torch.log2(largest / LARGEST[casting.storage])) + 1)
        q = (w / scale).float().to(getattr(torch, casting.storage)).double()
    return (q * scale).to(weight.dtype)


def round_offline(module: nn.Module, casting: Casting) -> nn.Module:
    """Round the weights that casting means, in place; a layer and its weight counted once."""
    done: set[int] = set()
    skipped = [name for name, _ in module.named_modules() if any(re.search(pattern, name) for pattern in NEVER_CAST)]
    layers = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, CASTABLE) and not any(name == one or name.startswith(f"{one}.") for one in skipped)
    }
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer._parameters.values():
                if parameter is None or id(parameter) in done or (casting.scaled and parameter.dim() < 2):
                    continue
                done.add(id(parameter))
                parameter.copy_(rounded(parameter, casting))
    return module


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str, str], torch.Tensor]:
    return {}


def reference(name: str, dtype: str, how: str, known: dict[tuple[str, str, str], torch.Tensor]) -> torch.Tensor:
    key = (name, dtype, how)
    if key not in known:
        case = CASES[name](DTYPES[dtype])
        round_offline(case.module, CASTINGS[how])
        known[key] = case.run()
        assert not torch.equal(known[key], plain(name, dtype)), "rounding must change what comes out"
    return known[key]


@pytest.mark.parametrize(("dtype", "name", "how"), thinned(DTYPES, CASES, CASTINGS))
def test_cast_equals_weights_rounded_beforehand(name, dtype, how, expected):
    case = CASES[name](DTYPES[dtype])
    apply_casting(case.module, CASTINGS[how])
    assert torch.equal(case.run(), reference(name, dtype, how, expected))
    assert torch.equal(case.run(), reference(name, dtype, how, expected))
    assert all(
        isinstance(view.slot.now(), AtRest) for leaf in leaves(case.module) for w in leaf.weights for view in w.views
    )


@pytest.mark.parametrize(("name", "rule", "zero_copy"), covering(CASES, RULES, [True, False]))
def test_cast_under_every_rule(name, rule, zero_copy, expected):
    how = "int8" if name in ("toy", "vae", "t5") else "e4m3"
    case = CASES[name](torch.bfloat16)
    apply_casting(case.module, CASTINGS[how])
    attachment = put(case.module, RULES[rule], zero_copy=zero_copy)
    for _ in range(2):
        assert torch.equal(case.run(), reference(name, "bf16", how, expected))
    assert all(u.load is None or u.stays or not attachment.stream.holders for u in attachment.units)
    assert attachment.stream.ledger.peak <= attachment.bound
    detach(case.module)
    assert torch.equal(case.run(), reference(name, "bf16", how, expected))


@pytest.mark.parametrize("name", CASES)
def test_cast_under_a_rule_and_undone_under_it(name, expected):
    case = CASES[name](torch.float32)
    put(case.module, RULES["blocks ahead"])
    case.run()
    apply_casting(case.module, CASTINGS["int8"])
    assert torch.equal(case.run(), reference(name, "fp32", "int8", expected))
    assert attachment_of(case.module) is not None
    remove_casting(case.module)
    assert not leaves(case.module)
    assert attachment_of(case.module) is not None
    assert torch.equal(case.run(), plain(name, "fp32"))  # the spilled file has them as they were
    detach(case.module)
    assert torch.equal(case.run(), plain(name, "fp32"))


def test_undone_without_a_file_keeps_what_8_bits_hold(expected):
    case = CASES["unet"](torch.float32)
    apply_casting(case.module, CASTINGS["int8"])
    with pytest.warns(UserWarning, match=r"weights \(conv_.* are in no file"):
        remove_casting(case.module)
    assert torch.equal(case.run(), reference("unet", "fp32", "int8", expected))
    assert not any(isinstance(parameter, AtRest) for parameter in case.module.parameters())


def test_another_casting_begins_from_what_there_is(expected):
    case = CASES["unet"](torch.float32)
    apply_casting(case.module, CASTINGS["e4m3"])
    apply_casting(case.module, CASTINGS["e4m3"])  # as it is: nothing to do
    with pytest.warns(UserWarning, match="in no file"):
        apply_casting(case.module, CASTINGS["e5m2"])
    twice = CASES["unet"](torch.float32)
    round_offline(round_offline(twice.module, CASTINGS["e4m3"]), CASTINGS["e5m2"])
    assert torch.equal(case.run(), twice.run())


def test_castings_of_different_layers_add_up():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    weights = [layer.weight.detach().clone() for layer in layers]
    apply_casting(layers, Casting("int8", skip_patterns=("1", "2")))
    apply_casting(layers, Casting("float8_e4m3fn", scaled=True, skip_patterns=("0", "2")))
    expected = [rounded(weights[0], CASTINGS["int8"]), rounded(weights[1], CASTINGS["e4m3 scaled"]), weights[2]]
    assert all(torch.equal(layer.state_dict()["weight"], one) for layer, one in zip(layers, expected, strict=True))


@pytest.mark.parametrize("rule", [None, "blocks ahead", "model"])
def test_state_copies_pickles_and_conversions(rule, expected):
    case = CASES["unet"](torch.float32)
    apply_casting(case.module, CASTINGS["int8"])
    if rule is not None:
        put(case.module, RULES[rule])
    right = reference("unet", "fp32", "int8", expected)
    state = case.module.state_dict()
    assert all(type(tensor) in (torch.Tensor, ReadOnly) for tensor in state.values())
    for made in (copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))):
        assert not leaves(made)
        assert not [key for module in made.modules() for key in vars(module) if key.startswith(("_lowtide", "_call_"))]
        with torch.no_grad():
            assert torch.equal(case.call(made), right)
    case.module.to(torch.bfloat16)  # the 8 bits stay, their product with the scale is rounded to bfloat16
    assert case.module.dtype == torch.bfloat16
    assert leaves(case.module)
    half = CASES["unet"](torch.bfloat16)
    half.module.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(half.call(case.module), half.run())
        case.module.load_state_dict(state)  # loaded numbers are cast
        round_offline(half.module, CASTINGS["int8"])
        assert torch.equal(half.call(case.module), half.run())


def test_nothing_is_left_behind_by_an_error(expected):
    case = CASES["unet"](torch.float32)
    apply_casting(case.module, CASTINGS["int8"])
    right = reference("unet", "fp32", "int8", expected)
    handle = case.module.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.run()
    handle.remove()
    assert all(
        isinstance(view.slot.now(), AtRest) for leaf in leaves(case.module) for w in leaf.weights for view in w.views
    )
    assert torch.equal(case.run(), right)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_backward_pass_through_dropped_numbers_is_an_error():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    apply_casting(layers, Casting("int8"))
    x = torch.randn(2, 8, requires_grad=True)
    y = layers(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_embeddings_give_rows_alone():
    from lowtide.casting.scratch import SCRATCH

    embedding = nn.Embedding(1000, 64)
    weight = embedding.weight.detach().clone()
    for how in CASTINGS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            remove_casting(embedding)
        embedding.weight = nn.Parameter(weight.clone())
        apply_casting(nn.Sequential(embedding), how)
        SCRATCH.release()
        ids = torch.tensor([[0, 999], [5, 5]])
        with torch.no_grad():
            out = embedding(ids)
        assert torch.equal(out, rounded(weight, how)[ids])
        assert not SCRATCH._free
        with pytest.raises(IndexError):
            embedding(torch.tensor([1000]))


def test_channels_last_weights_are_dequantized_in_their_order(expected):
    case = CASES["unet"](torch.float32)
    apply_casting(case.module, CASTINGS["int8"])
    case.module.to(memory_format=torch.channels_last)
    weight = case.module.conv_in.weight
    small = small_of(weight)
    assert small is not None
    assert weight.stride() == small.values().stride() == (36, 1, 12, 4)
    assert case.module.state_dict()["conv_in.weight"].stride() == (36, 1, 12, 4)
    plain_last = CASES["unet"](torch.float32)
    round_offline(plain_last.module, CASTINGS["int8"]).to(memory_format=torch.channels_last)
    assert torch.equal(case.run(), plain_last.run())


def test_bytes_that_move_are_the_small_ones():
    sizes = {}
    for how in (None, "int8", "e4m3"):
        case = CASES["unet"](torch.float32)
        if how is not None:
            apply_casting(case.module, CASTINGS[how])
        attachment = put(case.module, RULES["leaves ahead"], zero_copy=False)
        case.run()
        sizes[how] = attachment.stream.ledger.moved
    assert sizes["e4m3"] < sizes["int8"] < 0.45 * sizes[None]


FP8 = Casting("float8_e4m3fn", scaled=True, fp8_matmul=True)


@pytest.mark.parametrize("std", [0.001, 0.005, 0.02, 0.05])
def test_products_in_fp8(std):
    torch.manual_seed(0)
    layer = nn.Linear(320, 64).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.normal_(std=std)
        x = torch.randn(2, 7, 320).bfloat16()
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        rounded_weight = x.double() @ rounded(layer.weight, FP8).double().T + layer.bias.double()
        apply_casting(nn.Sequential(layer), FP8)
        out = layer(x).double()
    product = exact - layer.bias.double()
    assert (out - exact).norm() / product.norm() < 0.045
    assert (out - rounded_weight).norm() / product.norm() > 0.015  # the input is rounded too


def test_products_in_fp8_under_rules_and_conversions():
    layers = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 7), nn.Linear(7, 16)).to(torch.bfloat16)
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        apply_casting(layers, FP8)
        expected = layers(x)
        for rule in RULES.values():
            put(layers, rule)
            assert torch.equal(layers(x), expected)
            assert torch.equal(layers(x), expected)
        detach(layers)
        assert torch.equal(layers(x), expected)
        layers.to(torch.float32)  # not in fp8 any more
        plain = copy.deepcopy(layers)
        assert torch.equal(layers(x.float()), plain(x.float()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            remove_casting(layers)
    assert "forward" not in vars(layers[0])
    with pytest.raises(ValueError, match="fp8_matmul with storage='int8' is not possible"):
        Casting("int8", fp8_matmul=True)


@pytest.mark.parametrize("is_cast", [True, False])
@pytest.mark.parametrize("rule", [None, "leaves ahead", "model", "blocks on the host"])
def test_a_layer_that_is_given_another_weight_has_it(rule, is_cast):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)).requires_grad_(False)
    new, x = torch.randn(24, 16), torch.randn(3, 16)
    if is_cast:
        apply_casting(layers, Casting("int8"))
    if rule is not None:
        put(layers, RULES[rule])
    layers(x)
    layers[0].weight = nn.Parameter(new, requires_grad=False)
    expected = layers[2](layers[1](nn.functional.linear(x, new, layers[0].bias)))
    for _ in range(2):
        assert torch.equal(layers(x), expected)
    layers.to(torch.float32)
    assert torch.equal(layers(x), expected)
    detach(layers)
    assert torch.equal(layers(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remove_casting(layers)
    assert torch.equal(layers(x), expected)
    assert torch.equal(layers[0].weight, new)


def linears(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)]).requires_grad_(False)


X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a signal inside a weak reference's call
@pytest.mark.parametrize("rule", [None, "blocks on the host"])
def test_interrupts_anywhere_lose_nothing(rule):
    """A real signal at random moments: afterwards everything is as before."""
    layers = linears(4)
    apply_casting(layers, Casting("int8"))
    if rule is not None:
        put(layers, RULES[rule])
    expected, draw, hits = layers(X), random.Random(0), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(300):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, 2e-3))
                for _ in range(10):
                    layers(X)
                signal.setitimer(signal.ITIMER_REAL, 0)  # in here: it may just have come
                hits -= 1
            hits += 1
            assert torch.equal(layers(X), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 30


@pytest.mark.parametrize("made", [lambda w: w.t().contiguous().t(), lambda w: w.repeat(2, 2)[::2, ::2], lambda w: w])
def test_assigned_weights_of_any_layout(made):
    layers, new = linears(1), torch.randn(8, 8)
    apply_casting(layers, Casting("int8"))
    layers.load_state_dict({"0.weight": made(new), "0.bias": torch.zeros(8)}, assign=True)
    assert torch.equal(layers.state_dict()["0.weight"], rounded(made(new), CASTINGS["int8"]))


@pytest.mark.parametrize("is_cast", [True, False])
@pytest.mark.parametrize("rule", [None, "leaves ahead"])
def test_ties_made_afterwards_are_ties(rule, is_cast):
    layers = linears()
    if is_cast:
        apply_casting(layers, Casting("int8"))
    if rule is not None:
        put(layers, RULES[rule])
    layers[1].weight = layers[0].weight
    layers[1].bias = layers[0].bias
    for _ in range(2):
        assert torch.equal(layers[1](X), layers[0](X))
    assert layers[1].weight is layers[0].weight


def test_writes_to_data_are_told():
    layers = linears()
    apply_casting(layers, Casting("int8"))
    expected = layers(X)
    with pytest.raises(RuntimeError, match=r"0\.weight is at rest, so it cannot be written to"):
        layers[0].weight.data += 1
    with pytest.raises(RuntimeError, match="cannot be written to"):
        layers[0].weight.data = torch.zeros(8, 8)
    assert torch.equal(layers(X), expected)


def test_cast_in_inference_mode_serves_everywhere():
    with torch.inference_mode():
        layers = linears()
        apply_casting(layers, Casting("int8"))
        put(layers, RULES["leaves ahead"])
        expected = layers(X)
    assert torch.equal(layers(X), expected)


def test_products_in_fp8_are_switched():
    layers = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 32).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_casting(layers, Casting("float8_e4m3fn", scaled=True))
        plain_product = layers(x)
        apply_casting(layers, FP8)
        assert not torch.equal(layers(x), plain_product)
        apply_casting(layers, Casting("float8_e4m3fn", scaled=True))
        assert torch.equal(layers(x), plain_product)


class Tokens(nn.Module):
    """A layer that gives its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.tokens[1:]


def test_a_layer_that_gives_its_own_parameter():
    tokens, layer = Tokens(), linears(1)
    right = rounded(tokens.tokens, CASTINGS["e4m3"])[1:]
    apply_casting(tokens, Casting("float8_e4m3fn", skip_patterns=()))
    apply_casting(layer, Casting("int8"))
    given = tokens()
    layer(given)
    assert torch.equal(given, right)


def test_what_was_cast_is_gone_from_memory() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Embedding(16, 16)).requires_grad_(False)
    given = [weakref.ref(layer.weight) for layer in module]
    apply_casting(module, Casting("int8", skip_patterns=()))
    gc.collect()
    assert [tensor() for tensor in given] == [None, None]
