"""Networks are copied to meta whatever else their modules keep."""

import pytest
import torch
from torch import nn

from lowtide.prediction.meta_copy import meta_copy


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_of_others_come_along():
    network = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(2, 4, 3)), nn.utils.weight_norm(nn.Linear(4, 4)))
    assert not network[0].weight.is_leaf  # computed of `weight_g` and `weight_v`, and not to be copied by `deepcopy`
    twin = meta_copy(network)
    assert twin[0].weight.is_meta
    assert network[0].weight.device.type == "cpu"
    assert twin[0](torch.empty(1, 2, 8, device="meta")).shape == (1, 4, 6)
