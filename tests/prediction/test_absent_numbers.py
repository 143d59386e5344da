"""Code that mixes real tensors with those of networks on meta goes through, and shapes are the real ones."""

import pytest
import torch

from lowtide.prediction.absent_numbers import absent_numbers


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_a_grid_of_real_places_and_of_places_on_meta(indexing):
    frames, rows = torch.arange(3), torch.arange(2, device="meta")
    with pytest.raises(RuntimeError, match="same device"):
        torch.meshgrid(frames, rows, indexing=indexing)
    expected = torch.meshgrid(frames, torch.arange(2), indexing=indexing)
    with absent_numbers():
        for made in (
            torch.meshgrid(frames, rows, indexing=indexing),
            torch.meshgrid([frames, rows], indexing=indexing),
        ):
            assert all(grid.is_meta for grid in made)
            assert [grid.shape for grid in made] == [grid.shape for grid in expected]
        real = torch.meshgrid(frames, torch.arange(2), indexing=indexing)
    assert all(torch.equal(grid, other) for grid, other in zip(real, expected, strict=True))
