"""Rules that video decoders and newer picture decoders need: shuffled pixels, padding, masks, sums over all pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.activations.test_networks import Network, check, tokens
from tests.thinned import thinned
from torch import nn

from lowtide import apply_row_streaming


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def linear_attention(net, x):
    """Attention without a softmax: keys and values are summed up over all pixels, and a row of ones with them."""
    queries, keys, values = (part.flatten(2) for part in (F.relu(x), F.relu(net.before(x)), net.norm(x)))
    sums = torch.matmul(F.pad(values, (0, 0, 0, 1), value=1.0), keys.transpose(-1, -2))
    seen = torch.matmul(sums, queries)
    return x + (seen[:, :-1] / (seen[:, -1:] + 1e-3)).reshape(x.shape)


def attend_in_order(net, x):
    """Attention with a mask that the network makes of the numbers of the pixels."""
    numbers = torch.arange(x.shape[2] * x.shape[3], device=x.device)
    columns, rows = torch.meshgrid(numbers, numbers, indexing="xy")
    mask = torch.where(columns <= rows + 3, 0.0, -torch.inf).to(x.dtype).unsqueeze(0).expand(1, -1, -1)
    q = tokens(x)[:, None]
    return (
        F.scaled_dot_product_attention(q, net.project(q), q, attn_mask=mask).squeeze(1).transpose(1, 2).reshape(x.shape)
    )


def attend_to_the_first(net, x):
    """The same, with a mask that is written row by row."""
    count = x.shape[2] * x.shape[3]
    mask = torch.full((count, count), -torch.inf)
    for row in range(count):
        mask[row, : row // 2 + 1] = 0
    q = tokens(x)[:, None]
    return (
        F.scaled_dot_product_attention(q, net.project(q), q, attn_mask=mask).squeeze(1).transpose(1, 2).reshape(x.shape)
    )


def shuffled_by_hand(net, x):
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def unshuffled_by_hand(net, x):
    x = F.interpolate(x, scale_factor=4.0)
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)[:, :8]


def shuffled_shortcut(net, x):
    wide = F.pixel_shuffle(net.before(x).repeat(1, 4, 1, 1), 2)
    return wide + F.interpolate(x, scale_factor=2.0) + F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2)


def frames_as_pictures(net, x):
    pictures = torch.stack([x, x * 2, -x], dim=1).flatten(0, 1)
    return net.norm(net.before(pictures)).unflatten(0, (x.shape[0], 3))[:, 1]


RULES = {
    "linear attention": linear_attention,
    "attention with a mask": attend_in_order,
    "attention with a mask written by row": attend_to_the_first,
    "shuffled and back": lambda net, x: F.pixel_unshuffle(net.before(F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)), 2)[
        :, ::4
    ],
    "unshuffled by hand": unshuffled_by_hand,
    "shuffled beside others": shuffled_shortcut,
    "rows repeated": lambda net, x: net.before(x.repeat_interleave(3, dim=2)),
    "a transposed convolution without overlap": lambda net, x: F.conv_transpose2d(x, net.before.weight, stride=3),
    "the nearest around": lambda net, x: F.pad(x, (2, 1, 3, 2), mode="replicate"),
    "the nearest far around": lambda net, x: F.pad(x, (0, 0, 9, 11), mode="replicate"),
    "normalized": lambda net, x: F.normalize(x, dim=1),
    "frames as pictures": frames_as_pictures,
    "numbers for columns": lambda net, x: x * torch.linspace(1, 2, x.shape[3]) + torch.ones_like(x),
}


@pytest.mark.parametrize(("name", "size"), thinned(RULES, [(7, 7), (1, 5), (16, 3)]))
def test_every_rule(name, size):
    check(Network(RULES[name]), tiny.numbers((2, 8, *size), 3), works=(1, 3_000, None))


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (16, 3)], ids=str)
@pytest.mark.parametrize("around", [(1, 2, 2, 1), (0, 0, 2, 2), (2, 0, 0, 2)], ids=str)
def test_reflection_at_the_edge(size, around):
    check(Network(lambda net, x: F.pad(x, around, mode="reflect")), tiny.numbers((1, 8, *size), 3))


@pytest.mark.parametrize(
    "function",
    [lambda net, x: F.pixel_shuffle(x, 2), shuffled_by_hand, lambda net, x: shuffled_by_hand(net, net.norm(x))],
    ids=["by its name", "by hand", "after a norm"],
)
def test_an_output_of_shuffled_pixels(function):
    network = Network(function)
    network.after = nn.Identity()
    check(network, tiny.numbers((2, 8, 6, 5), 3))


class Remembering(nn.Module):
    """Keeps what it saw for its next call, as some video decoders do."""

    def __init__(self):
        super().__init__()
        self.before = None

    def forward(self, x):
        x = x if self.before is None else x + self.before
        self.before = x * 0.5
        return x


def test_a_network_that_keeps_tensors_in_its_attributes_is_refused():
    module = Remembering()
    apply_row_streaming(module)
    with pytest.raises(ValueError, match="its Remembering keeps a tensor in before for later calls"):
        module(tiny.numbers((1, 8, 7, 7), 3))
    assert module.before is None


def test_a_plan_is_made_anew_when_a_number_in_the_network_changes():
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, x):
            return x * self.factor

    module, x = Scaled(), tiny.numbers((1, 8, 7, 7), 3)
    apply_row_streaming(module)
    for factor in (2.0, 3.0):
        module.factor = factor
        assert torch.equal(module(x), x * factor)
