"""The tensors that `state_dict` gives under an offload: read like any other, and never written to in vain."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowtide.hooks import apply_layerwise_casting
from lowtide.memory import apply_residency, detach
from lowtide.memory.read_only import ReadOnly
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

RESTS: list[dict[str, Any]] = [
    {"rest": "host"},
    {"rest": "host", "level": "leaf"},
    {"rest": "disk"},
    {"level": "whole"},
]
X = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.fixture
def module(tmp_path: Path) -> nn.Sequential:
    """Two layers whose weights are those of a file."""
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).state_dict(), tmp_path / "x.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    fill(empty, read_index(tmp_path / "x.safetensors"), dtype=torch.float32)
    return empty


def _set_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(16, 8)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda tensor: tensor.add_(1),
    "copy_": lambda tensor: tensor.copy_(torch.ones(16, 8)),
    "an element": lambda tensor: tensor.__setitem__((0, 0), 5),
    "data": lambda tensor: tensor.data.add_(1),
    "another data": _set_data,
    "a view": lambda tensor: tensor.view(-1)[3:].fill_(2),
    "detached": lambda tensor: tensor.detach().t().mul_(2),
    "an array": lambda tensor: tensor.numpy().fill(3),
    "np.asarray": lambda tensor: np.asarray(tensor).fill(3),
    "many at once": lambda tensor: torch._foreach_add_([tensor], 1),  # type: ignore[attr-defined]
    "out": lambda tensor: torch.add(torch.ones(16, 8), 1, out=tensor),
    "init": nn.init.normal_,
    "another size": lambda tensor: tensor.resize_(4, 4),
}


@pytest.mark.parametrize("rule", RESTS, ids=str)
def test_a_write_is_an_error_and_changes_nothing(module: nn.Module, rule: dict[str, Any]) -> None:
    expected = module(X)
    apply_residency(module, device="cpu", **rule)
    for name, write in WRITES.items():
        with pytest.raises((RuntimeError, ValueError), match=r"0\.weight is at rest.*load_state_dict|read-only"):
            write(module.state_dict()["0.weight"])
        assert torch.equal(module(X), expected), name
    detach(module)
    assert torch.equal(module(X), expected)
    module.state_dict()["0.weight"].add_(1)  # without a rule as ever
    assert not torch.equal(module(X), expected)


def test_under_a_casting_too(module: nn.Module) -> None:
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32, None)
    expected = module(X)
    with pytest.raises(RuntimeError, match=r"0\.weight is at rest"):
        module.state_dict()["0.weight"].add_(1)
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("rule", RESTS, ids=str)
def test_it_is_read_copied_and_saved_as_any_other(module: nn.Module, rule: dict[str, Any], tmp_path: Path) -> None:
    plain = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = module(X)
    apply_residency(module, device="cpu", **rule)
    state = module.state_dict()
    assert isinstance(state["0.weight"], ReadOnly)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    save_file(state, tmp_path / "again.safetensors")
    other = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    other.load_state_dict(state)
    copies = [copy.deepcopy(dict(state)), torch.load(buffer), load_file(tmp_path / "again.safetensors")]
    for held in (*copies, {name: tensor.clone() for name, tensor in state.items()}, other.state_dict()):
        for name, tensor in plain.items():
            assert type(held[name]) is torch.Tensor
            assert torch.equal(held[name], tensor)
            assert np.array_equal(state[name].numpy(), tensor.numpy())
        held["0.weight"].add_(1)
    assert type(state["0.weight"] + 1) is type(X @ state["0.weight"].t()) is torch.Tensor
    assert repr(state["0.bias"]).startswith("ReadOnly(0.bias: tensor(")
    assert torch.equal(module(X), expected)


def test_a_module_that_takes_them_over_computes_and_can_be_offloaded(module: nn.Module) -> None:
    expected = module(X)
    apply_residency(module, rest="disk", device="cpu")
    other = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other(X), expected)
    apply_residency(other, rest="host", device="cpu")
    assert torch.equal(other(X), expected)
    detach(other)
    assert torch.equal(other(X), expected)
