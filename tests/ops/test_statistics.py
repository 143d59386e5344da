"""Statistics of channels: those of the whole map, whatever the parts, the mean and the spread."""

import pytest
import torch
from tests import tiny
from torch import nn

from lowtide.ops import statistics
from lowtide.ops.statistics import ChannelStatistics


def of_parts(x, rows):
    found = ChannelStatistics()
    for part in x.split(rows, dim=2):
        found.add(part)
    return found


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (100, 1), (-1000, 0.5), (3, 1e-3)])
def test_as_of_the_whole_map_in_double_precision(rows, mean, spread):
    x = tiny.numbers((1, 12, 64, 40), 3) * spread + mean + torch.arange(12)[:, None, None]
    found, exact = of_parts(x, rows), x.double()
    assert found.count == 64 * 40
    assert torch.allclose(found.mean_C, exact.mean((0, 2, 3)), rtol=3e-7, atol=1e-7 * spread)
    variance = found.squares_C / found.count
    assert torch.allclose(variance, exact.var((0, 2, 3), correction=0), rtol=2e-5 * (1 + abs(mean) / spread / 1000))


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_as_factor_and_term(groups, affine):
    x, norm = tiny.numbers((1, 12, 9, 7), 3) * 4 + 2, nn.GroupNorm(groups, 12, affine=affine).double()
    norm = tiny.set_weights(norm) if affine else norm
    factor, term = of_parts(x, 2).scale_and_shift(groups, norm.weight, norm.bias, norm.eps)
    found = x.double() * factor.view(1, -1, 1, 1) + term.view(1, -1, 1, 1)
    assert torch.allclose(found, norm(x.double()), rtol=1e-6, atol=1e-6)


def test_parts_that_are_not_joined_would_be_seen(monkeypatch):
    """Negative control: sums joined without the difference of their means."""
    x = torch.linspace(0, 10, 64)[:, None].expand(1, 4, 64, 8)
    right = x.double().var((0, 2, 3), correction=0)

    def plain(self, count, mean, squares):
        self.count += count
        self.mean_C = mean
        self.squares_C = squares if self.squares_C is None else self.squares_C + squares

    assert torch.allclose(of_parts(x, 4).squares_C / (64 * 8), right, rtol=1e-6)
    monkeypatch.setattr(ChannelStatistics, "_join", plain)
    assert not torch.allclose(of_parts(x, 4).squares_C / (64 * 8), right, rtol=0.1)


def test_large_parts_are_summed_in_pieces(monkeypatch):
    monkeypatch.setattr(statistics, "PARTIAL_ENTRIES", 40)
    x = tiny.numbers((1, 12, 8, 5), 3)
    assert torch.allclose(of_parts(x, 8).mean_C, x.double().mean((0, 2, 3)), atol=1e-7)
