"""Code that mixes real tensors with those of networks on meta goes through, and shapes are the real ones."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lowtide.prediction.absent_numbers import absent_numbers
from lowtide.prediction.driving import drive


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


def test_tokens_made_of_numbers_are_counted():
    network = torch.nn.Linear(8, 8, bias=False, device="meta")

    def run(count):
        tokens = torch.tensor([[1] * count])
        network(torch.zeros(1, 8))
        del tokens

    before = [drive(partial(run, count), {"network": network}, entries=()).calls[0].before for count in (1, 78)]
    assert before[1] - before[0] == 77 * 8


def test_copies_of_schedulers_are_counted():
    """As SkyReels has one for each frame; a tensor that is in one twice is copied once."""
    sigmas, network = torch.zeros(1000), torch.nn.Linear(8, 8, bias=False, device="meta")
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=sigmas)

    def run(count):
        kept = [copy.deepcopy(scheduler) for _ in range(count)]
        network(torch.zeros(1, 8))
        del kept

    before = [drive(partial(run, count), {"network": network}, entries=()).calls[0].before for count in (0, 3)]
    assert before[1] - before[0] == 3 * sigmas.nbytes


def test_no_expert_gets_a_token_twice():
    """Of experts that were chosen for each token one gets each token at most; of other numbers all may be equal."""
    scores = torch.empty(5, 4, device="meta")
    with absent_numbers():
        chosen = scores.topk(2, dim=-1)[1]
        assert chosen.view(-1).bincount().tolist() == [5, 5]
        assert scores.topk(3, dim=0)[1].view(-1).bincount().tolist() == [4, 4, 4]
        assert chosen[:, 0].bincount().tolist() == [5]
        del chosen
        assert torch.empty(10, dtype=torch.int64, device="meta").bincount(minlength=4).tolist() == [10, 0, 0, 0]
