"""A weight that came from a file and was changed since is never taken for the file's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowtide.memory import apply_residency, attachment_of, detach
from lowtide.memory.store import DiskRest
from lowtide.weights import provenance
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index
from lowtide.weights.provenance import origin_of


def write_through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[1, 2] += 1


def write_through_data(weight: nn.Parameter) -> None:
    weight.data[1, 2] += 1


def write_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[1, 2] += 1


def becomes(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Parameter], None]:
    def change(weight: nn.Parameter) -> None:
        weight.data = make(weight.data)

    return change


SEEN_BY_FACTS = {
    "longer": becomes(lambda w: torch.cat([w, torch.ones(1, w.shape[1])])),
    "much longer": becomes(lambda w: torch.cat([w] * 5)),
    "shorter": becomes(lambda w: w[:3].clone()),
    "narrower": becomes(lambda w: w[:, :5].contiguous()),
    "a part of it": becomes(lambda w: w[2:4]),
    "wider": becomes(lambda w: torch.cat([w, w], 1)),
    "another dtype": becomes(lambda w: w.double() + 1e-12),
    "transposed": becomes(lambda w: w.T.contiguous()),
    "transposed strides": becomes(lambda w: w.T.contiguous().T + 1),
    "a transposed view": becomes(lambda w: w.T),
    "expanded": becomes(lambda w: w[:1].expand(4, -1)),
    "other values": becomes(lambda w: w + 1),
    "in place": write_in_place,
}
SEEN_BY_BYTES = {"through numpy": write_through_numpy, "through data": write_through_data}
CHANGES = {**SEEN_BY_FACTS, **SEEN_BY_BYTES}


@pytest.fixture(params=["mapped", "converted"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Linear:
    """A layer whose weight is that of a file, mapped or converted from it."""
    torch.manual_seed(0)
    dtype = torch.float32 if request.param == "mapped" else torch.float16
    save_file({"weight": torch.randn(7, 6).to(dtype)}, tmp_path / "x.safetensors")
    made = nn.Linear(6, 7, bias=False)
    fill(made, read_index(tmp_path / "x.safetensors"), dtype=torch.float32)
    assert origin_of(made.weight) is not None
    return made


def call(layer: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    x = torch.arange(2 * weight.shape[1], dtype=weight.dtype).view(2, -1).sin()
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_works_as_it_is(layer: nn.Linear, change: str, rest: str) -> None:
    CHANGES[change](layer.weight)
    numbers = layer.weight.detach().clone()
    expected = call(layer, numbers)
    for level in ("leaf", "whole"):
        apply_residency(layer, 0, rest=rest, level=level, device="cpu")
        assert torch.equal(call(layer, numbers), expected)
        assert torch.equal(layer.state_dict()["weight"], numbers)
    detach(layer)
    assert torch.equal(call(layer, numbers), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_changed_between_two_rules(layer: nn.Linear, change: str) -> None:
    apply_residency(layer, 0, rest="host", device="cpu")
    detach(layer)
    CHANGES[change](layer.weight)
    numbers = layer.weight.detach().clone()
    expected = call(layer, numbers)
    apply_residency(layer, 0, rest="disk", device="cpu")
    assert torch.equal(call(layer, numbers), expected)


def test_resting_bytes_that_somebody_wrote_to(layer: nn.Linear) -> None:
    apply_residency(layer, 0, rest="host", device="cpu")
    layer.state_dict()["weight"].plain.add_(1)  # by a way that we do not see
    numbers = layer.state_dict()["weight"].clone()
    expected = call(layer, numbers)
    apply_residency(layer, 0, rest="disk", device="cpu")
    assert torch.equal(call(layer, numbers), expected)


@pytest.mark.parametrize("change", SEEN_BY_FACTS)
def test_what_is_seen_by_facts_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    save_file({"weight": torch.randn(7, 6).half()}, tmp_path / "x.safetensors")
    layer = nn.Linear(6, 7, bias=False)
    fill(layer, read_index(tmp_path / "x.safetensors"), dtype=torch.float32)
    SEEN_BY_FACTS[change](layer.weight)
    monkeypatch.setattr(provenance, "pieces", lambda _: pytest.fail("the file was read"))
    assert origin_of(layer.weight) is None


@pytest.mark.parametrize("is_detached_between", [False, True])
def test_a_weight_goes_back_to_its_file(layer: nn.Linear, *, is_detached_between: bool) -> None:
    """From the file to host memory and back, under rules alone or by way of tensors: never a second file."""
    file = origin_of(layer.weight)
    numbers = layer.weight.detach().clone()
    for rest in ("host", "disk", "host", "host", "disk"):
        apply_residency(layer, 0, rest=rest, device="cpu")
        assert torch.equal(layer.state_dict()["weight"], numbers)
        if is_detached_between:
            detach(layer)
    apply_residency(layer, 0, rest="disk", device="cpu")
    attachment = attachment_of(layer)
    assert attachment is not None
    (weight,) = attachment.weights
    assert isinstance(weight.rest, DiskRest)
    assert file is not None
    assert weight.rest.origin.file is file.file
