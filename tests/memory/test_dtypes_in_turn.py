"""A module under a rule that is given one dtype after another: its numbers are rounded as those of a plain one are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.memory.cases import RULES, put
from torch import nn

from lowtide.memory import detach
from lowtide.memory.store import DiskRest
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
IN_TURN = [
    (F16, F32),  # as SDXL's autoencoder is cast up for its decode
    (F16, F32, F16),
    (F16, F32, BF16),
    (F16, F32, BF16, F32),
    (BF16, F16),
    (BF16, F16, F32, F64),
    (F64, F32),
    (BF16, F64, BF16, F64),
]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8)))


def in_file(file: Path, dtype: torch.dtype) -> nn.Module:
    """A network whose weights are views of a file, in the file's dtype."""
    with torch.no_grad():
        state = {name: value.to(dtype) for name, value in tiny.set_weights(network()).state_dict().items()}
    save_file(state, file)
    with torch.device("meta"):
        module = network().to(dtype)
    fill(module, read_index(file))
    return module


def run(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(tiny.numbers((2, 16)).to(next(module.parameters()).dtype))


@pytest.mark.parametrize(("in_turn", "rule"), list(zip(IN_TURN, itertools.cycle(RULES), strict=False)), ids=str)
@pytest.mark.parametrize("stored", [F32, F16], ids=str)
def test_numbers_are_rounded_as_plain_ones(tmp_path: Path, stored: torch.dtype, in_turn: tuple, rule: str) -> None:
    plain, module = (in_file(tmp_path / f"{name}.safetensors", stored) for name in ("plain", "ruled"))
    put(module, RULES[rule])
    for dtype in in_turn:
        plain.to(dtype)
        module.to(dtype)
        assert torch.equal(run(module), run(plain))
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())
    detach(module)
    assert torch.equal(run(module), run(plain))
    assert not any(value.dtype != in_turn[-1] for value in module.parameters())


def test_it_makes_a_difference(tmp_path: Path) -> None:
    """The control: what went through 16 bits is not what the file has."""
    plain = in_file(tmp_path / "plain.safetensors", F32)
    before = run(plain)
    assert not torch.equal(run(plain.half().float()), before)


def test_up_and_down_again_rests_in_the_file(tmp_path: Path) -> None:
    """In float32 it is no view of the file, though that has float32: it was rounded."""
    module = in_file(tmp_path / "x.safetensors", F32)
    put(module, RULES["leaves ahead"])
    for dtype in (F16, F32, F16):
        module.to(dtype)
        weights = [parameter.weight for parameter in module.parameters()]  # type: ignore[attr-defined]
        assert all(isinstance(weight.rest, DiskRest) and not weight.rest.works_in_place for weight in weights)
        run(module)
