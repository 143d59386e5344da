"""Modules that return their own weights, or views of them: the results stay right when the buffer is used again."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tests.memory.cases import put
from torch import nn
from transformers.utils.generic import ModelOutput

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import Casting
from lowtide.memory import apply_residency
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.memory.stream import Stream
from lowtide.memory.unit import Load
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

RULES = {
    "leaf": Rule(Level.LEAF, Tier.HOST, prefetch=0),
    "leaf ahead": Rule(Level.LEAF, Tier.HOST),
    "block": Rule(Level.BLOCK, Tier.HOST),
    "pairs": Rule(Level.BLOCK, Tier.HOST, blocks_per_group=2),
    "whole": Rule(Level.WHOLE, Tier.HOST, prefetch=0),
}


@dataclasses.dataclass
class Output(ModelOutput):
    sample: Any = None
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    sample: Any
    rest: Any


class Named(NamedTuple):
    sample: Any
    rest: Any


SHAPES: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list in a dict": lambda a, b: {"sample": [a], "rest": (b, None)},
    "ordered dict": lambda a, b: OrderedDict(sample=a, rest={"deep": b}),
    "model output": lambda a, b: Output(sample=a, rest=(b,)),
    "frozen dataclass": lambda a, b: Frozen(a, [b]),
    "named tuple": Named,
}


class Codes(nn.Module):
    """Returns its parameter, and a view of its buffer."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.register_buffer("table", torch.randn(6, 4))
        self.shape = shape

    def forward(self, x: torch.Tensor) -> Any:
        return SHAPES[self.shape](self.codes, self.table[1:3].T)


class Block(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.codes, self.up = Codes(shape), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.up(x), self.codes(x)


class Whole(nn.Module):
    def __init__(self, shape: str = "tuple") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(4))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        found = []
        for block in self.blocks:
            x, codes = block(x * self.scale)
            found.append(codes)
        return {"x": x, "codes": found, "scale": self.scale}

    def encode(self, x: torch.Tensor) -> Any:
        return self.blocks[0](x)[1], self.blocks[2].codes(x), self.scale[1:]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        return tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    inner = value.values() if isinstance(value, dict) else value
    return [] if value is None else [tensor for item in inner for tensor in tensors(item)]


def kinds(value: Any) -> Any:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return type(value).__name__.replace("Parameter", "Tensor").replace("AtRest", "Tensor"), [kinds(i) for i in inner]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a released buffer held is gone at once; counts them."""
    release, released = Stream._release, []

    def poisoned(self: Stream, load: Load) -> None:
        release(self, load)
        if load.buffer is not None:
            load.buffer.flat.fill_(0xFF)
            released.append(1)

    monkeypatch.setattr(Stream, "_release", poisoned)
    return released


def check(module: Whole, plain: Whole) -> None:
    x = torch.randn(2, 4)
    with torch.no_grad():
        for call in (lambda m: m(x), lambda m: m.encode(x)):
            expected = call(plain)
            results = [call(module) for _ in range(2)]
            for result in results:
                assert kinds(result) == kinds(expected)
                pairs = zip(tensors(result), tensors(expected), strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_outputs_that_are_weights_outlive_their_buffer(poison: list[int], rule: str, shape: str) -> None:
    module = Whole(shape)
    put(module, RULES[rule], zero_copy=False)
    check(module, Whole(shape))
    assert poison, "buffers were released"


@pytest.mark.parametrize("level", ["leaf", "block", "whole"])
def test_outputs_that_are_weights_converted_from_a_file(poison: list[int], tmp_path: Path, level: str) -> None:
    plain = Whole().half().float()
    save_file({name: tensor.half() for name, tensor in plain.state_dict().items()}, tmp_path / "x.safetensors")
    module = Whole()
    fill(module, read_index(tmp_path / "x.safetensors"), dtype=torch.float32)
    apply_residency(module, rest="disk", level=level, device="cpu")
    check(module, plain)
    assert poison, "buffers were released"


@pytest.mark.parametrize("rule", RULES)
def test_outputs_that_are_weights_and_take_gradients(rule: str) -> None:
    module, plain, x = Whole(), Whole(), torch.randn(2, 4)
    put(module, RULES[rule], zero_copy=False)
    pairs = zip(tensors(module(x)), tensors(plain(x)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_outputs_that_are_no_weights_are_left_alone() -> None:
    class Same(nn.Linear):
        def forward(self, x: Any) -> Any:  # type: ignore[override]
            return x

    module, x = nn.Sequential(Same(4, 4), nn.Linear(4, 4)), {"x": [torch.randn(1), (2, None)]}
    put(module, RULES["leaf"], zero_copy=False)
    assert module[0](x) is x


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_are_weights_in_eight_bits(shape: str) -> None:
    """The same for a layer that is dequantized around its calls."""

    class Weighted(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return SHAPES[shape](self.weight, self.weight[1:3])

    module = nn.Sequential(Weighted(16, 16, bias=False))
    apply_casting(module, Casting("int8", skip_patterns=()))
    with torch.no_grad():
        expected = module[0].weight.clone()
        first, second = tensors_after(module)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected[1:3])


def tensors_after(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a result, looked at after another layer has worked where they were made."""
    result = module(torch.randn(2, 16))
    other = nn.Sequential(nn.Linear(16, 16, bias=False))
    apply_casting(other, Casting("int8", skip_patterns=()))
    other(torch.randn(2, 16))
    return tensors(result)
