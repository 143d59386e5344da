"""Conversions that are followed: what is in the file is found there, all else is computed alone and equal."""

import pytest
import torch
from safetensors.torch import save_file

from lowtide.guests.followed import Followed, NotFollowedError
from lowtide.weights.index import read_index


@pytest.fixture
def file(tmp_path):
    numbers = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    save_file({"fused": numbers, "kernel": numbers[:, :, None, None].clone()}, tmp_path / "w.safetensors")
    return read_index(tmp_path / "w.safetensors"), numbers


IN_THE_FILE = {
    "as it is": (lambda x: x, 0, 12),
    "rows": (lambda x: x.chunk(3)[1], 4, 4),
    "copied rows": (lambda x: torch.cat([x.split((2, 10))[1]]).clone(), 2, 10),
    "cloned and of them rows": (lambda x: x[3:].clone().detach()[1:], 4, 8),
    "flattened": (lambda x: x[2:4].reshape(-1), 2, 2),
}
COMPUTED = {
    "halves that change places": lambda x: torch.cat(x.chunk(2)[::-1]),
    "turned": lambda x: x.T.contiguous(),
    "turned, not copied": lambda x: x.T,
    "columns": lambda x: x[:, 1:3],
    "of another dtype": lambda x: x.to(torch.bfloat16),
    "computed": lambda x: (2 * x)[3:] + 1,
    "the second of several": lambda x: torch.sort(x, dim=1)[1],
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_what_is_in_the_file_is_found_there(file, name):
    index, numbers = file
    convert, first, rows = IN_THE_FILE[name]
    followed = Followed()
    with followed:
        result = convert(followed.on_meta(index["fused"]))
    entry = followed.entry(result)
    assert (entry.offset, entry.nbytes) == (index["fused"].offset + first * 20, rows * 20)
    assert torch.equal(followed.numbers(result, {}), convert(numbers))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_is_computed_alone(file, name):
    index, numbers = file
    followed = Followed()
    with followed:
        result = COMPUTED[name](followed.on_meta(index["fused"]))
    assert followed.entry(result) is None
    assert torch.equal(followed.numbers(result, {}), COMPUTED[name](numbers))


def test_a_kernel_of_one_pixel_is_a_matrix(file):
    index, numbers = file
    followed = Followed()
    with followed:
        result = followed.on_meta(index["kernel"])[:, :, 0, 0]
    assert followed.entry(result).shape == (12, 5)
    assert torch.equal(followed.numbers(result, {}), numbers)


def test_what_writes_or_asks_for_numbers_is_not_followed(file):
    index, _ = file
    followed = Followed()
    with followed:
        tensor = followed.on_meta(index["fused"])
        with pytest.raises(NotFollowedError, match="writes into"):
            tensor.mul_(2)
        with pytest.raises(RuntimeError):
            bool((tensor == 0).all())


def test_other_tensors_are_computed_as_ever():
    with Followed() as followed:
        result = torch.eye(3) * 2
    assert followed.entry(result) is None
    assert followed.numbers(result, {}) is result
