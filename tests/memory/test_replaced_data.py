"""Weights of a file whose `.data` a script replaced or edited are no longer the file's, whatever they begin with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowtide.hooks import apply_layerwise_casting, disable_layerwise_casting
from lowtide.memory import apply_residency, detach
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

RULES: list[dict[str, Any]] = [{}, {"rest": "host"}, {"level": "leaf"}, {"level": "whole"}]


def two_layers(inner: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, inner), nn.Linear(inner, 8)).requires_grad_(False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    save_file(two_layers().state_dict(), path)
    return path


def loaded(file: Path) -> nn.Sequential:
    with torch.device("meta"):
        module = two_layers()
    fill(module, read_index(file), dtype=torch.float32)
    return module


def _widened(module: nn.Sequential, join: Callable[[nn.Parameter, torch.Tensor, int], None]) -> None:
    first, second = module
    join(first.weight, torch.ones(1, 8), 0)
    join(first.bias, torch.ones(1), 0)
    join(second.weight, torch.ones(8, 1), 1)


def longer(module: nn.Sequential) -> None:
    def join(weight: nn.Parameter, more: torch.Tensor, dim: int) -> None:
        weight.data = torch.cat([weight.data, more], dim)

    _widened(module, join)


def longer_by_resizing(module: nn.Sequential) -> None:
    def join(weight: nn.Parameter, more: torch.Tensor, dim: int) -> None:
        joined = torch.cat([weight.data, more], dim)
        weight.data = weight.data.clone().resize_(joined.shape).copy_(joined)

    _widened(module, join)


def shorter(module: nn.Sequential) -> None:
    first, second = module
    first.weight.data, first.bias.data, second.weight.data = (
        first.weight.data[:12],
        first.bias.data[:12],
        second.weight.data[:, :12],
    )


def transposed(module: nn.Sequential) -> None:
    module[0].weight.data = module[0].weight.data.reshape(8, 16).t()


def written_to(module: nn.Sequential) -> None:
    module[0].weight.data.add_(1)


def through_numpy(module: nn.Sequential) -> None:
    module[0].weight.data.numpy()[0] = 5


def one_row_for_all(module: nn.Sequential) -> None:
    module[0].weight.data = module[0].weight.data[:1].expand(16, 8)


def another_dtype(module: nn.Sequential) -> None:
    module.double()


CHANGES = [longer, longer_by_resizing, shorter, transposed, written_to, through_numpy, one_row_for_all, another_dtype]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_is_what_computes(change: Callable[[nn.Sequential], None], file: Path, tmp_path: Path) -> None:
    for rule in RULES:
        for was_offloaded in (False, True):
            module = loaded(file)
            if was_offloaded:
                apply_residency(module, device="cpu", **rule)
                detach(module)
            untouched = module(torch.ones(2, 8))
            change(module)
            x = torch.ones(2, 8, dtype=module[0].weight.dtype)
            expected = module(x)
            assert change is another_dtype or not torch.equal(expected, untouched)
            apply_residency(module, 0, device="cpu", **rule)
            assert torch.equal(module(x), expected), rule
            state = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in module.state_dict().items()
            }
            save_file(state, tmp_path / "again.safetensors")
            detach(module)
            assert torch.equal(module(x), expected), rule
            again = two_layers(len(module[0].weight)).to(x.dtype)
            again.load_state_dict(load_file(tmp_path / "again.safetensors"))
            for name, tensor in module.state_dict().items():
                assert torch.equal(again.state_dict()[name], tensor), (rule, name)


@pytest.mark.parametrize("change", [longer, shorter, written_to], ids=lambda change: change.__name__)
def test_undoing_a_casting_gives_back_what_was_changed(change: Callable[[nn.Sequential], None], file: Path) -> None:
    module = loaded(file)
    change(module)
    expected = module(torch.ones(2, 8))
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that what is in no file keeps its rounded values
        disable_layerwise_casting(module)
    assert torch.allclose(module(torch.ones(2, 8)), expected, rtol=0.2, atol=0.2)
