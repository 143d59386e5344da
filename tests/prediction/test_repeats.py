"""What was traced once is not gone through again: blocks of equal structure, and operators of equal inputs."""

import pytest
import torch
from torch import nn

from lowtide.ops.meta_device import standing_for
from lowtide.prediction import repeated_operators
from lowtide.prediction.component import trace
from lowtide.prediction.repeated_operators import result_of
from lowtide.prediction.repeats import Signatures


class Block(nn.Module):
    def __init__(self, gone_through, activation=torch.relu, width=8):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
        self.gone_through = gone_through
        self.activation = activation

    def forward(self, x):
        self.gone_through.append(self)
        return x + self.activation(self.inner(x))


def blocks(*options):
    gone_through = Seen()
    with torch.device("meta"):
        network = nn.Sequential(*(Block(gone_through, **own) for own in options))
        x = torch.empty(2, 8)
    return network, x, gone_through


class Seen(list):
    """Equal to nothing but itself, as objects are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_of_blocks_of_equal_structure_one_is_gone_through():
    network, x, gone_through = blocks({}, {}, {}, {"width": 4}, {})
    traced = trace(lambda: network(x), [network], [x])
    assert gone_through == [network[0], network[3]]
    assert traced.order.index(network[4].inner[0]) > traced.order.index(network[3])
    assert len(traced.order) == len(list(network.modules()))


def test_a_block_that_hooks_see_is_gone_through():
    network, x, gone_through = blocks({}, {}, {})
    network[1].inner.register_forward_hook(lambda *_: None)
    trace(lambda: network(x), [network], [x])
    assert gone_through == [network[0], network[1]]


def scaled_by(number):
    return lambda x: x * number


@pytest.mark.parametrize(
    ("functions", "are_equal"),
    [
        ((torch.relu, torch.relu), True),
        ((torch.relu, torch.tanh), False),
        ((nn.functional.silu, nn.functional.gelu), False),
        ((nn.functional.silu, nn.functional.mish), False),
        ((scaled_by(2), scaled_by(2)), True),
        ((scaled_by(2), scaled_by(3)), False),
        ((scaled_by(2), scaled_by(2.0)), False),
    ],
)
def test_functions_that_modules_hold_are_told_apart(functions, are_equal):
    network, _, _ = blocks(*({"activation": function} for function in functions))
    signatures = Signatures()
    assert (signatures.of(network[0]) == signatures.of(network[1])) is are_equal


@pytest.fixture
def asked(monkeypatch):
    """Operators that PyTorch is asked about."""
    asked = []
    monkeypatch.setattr(repeated_operators, "_FORMS", {})
    monkeypatch.setattr(repeated_operators, "made_by", lambda *call: asked.append(call[0]) or call[0](*call[1]))
    return asked


def test_pytorch_is_asked_once_for_each_operator_form_and_device(asked):
    add, x, y = torch.ops.aten.add.Tensor, torch.empty(2, 3, device="meta"), torch.empty(3, 2, device="meta").t()
    for device in ("cpu", "cuda"):
        with standing_for(device):
            for given in ((x, x), (y, y), (x, x), (y, y)):
                result = result_of(add, given, {})
                assert (result.shape, result.stride()) == ((2, 3), given[0].stride())
                assert result.untyped_storage()._cdata != given[0].untyped_storage()._cdata
    assert len(asked) == 4


def test_as_many_forms_as_are_bounded_are_kept(asked, monkeypatch):
    monkeypatch.setattr(repeated_operators, "MOST_FORMS", 3)
    with standing_for("cpu"):
        for size in range(1, 9):
            result_of(torch.ops.aten.add.Tensor, (torch.empty(size, device="meta"),) * 2, {})
            assert len(repeated_operators._FORMS) <= 3


class Causal(nn.Module):
    """Keeps the last frames that it saw in a list of its caller, and counts there the frames that it was given."""

    def __init__(self, gone_through):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.gone_through = gone_through

    def forward(self, x, kept, count):
        self.gone_through.append(len(x))
        before = x[:1].clone() if kept[0] is None else kept[0]
        y = self.inner(torch.cat([before, x]))
        kept[0] = x[-2:].clone() if len(x) > 1 else torch.cat([before, x])[-2:]
        kept[1] = {"first": y[:1], "given": x}
        count[0] += len(x)
        return y[len(before) :]


def frame_by_frame(*, frames, device, is_watched):
    """Trace a clip frame by frame; with hooks every call is gone through."""
    gone_through = Seen()
    with torch.device("meta"):
        network, clip = Causal(gone_through), torch.empty(frames, 8)
    if is_watched:
        network.inner.register_forward_hook(lambda *_: None)

    def run():
        kept, outputs = [None, {}], []
        for frame in clip.split(1):
            count = [0]
            outputs.append(network(frame, kept, count))
            assert count == [1]
            assert kept[0].shape == (2, 8)
            assert kept[1]["given"].untyped_storage()._cdata == clip.untyped_storage()._cdata
            assert kept[1]["given"].storage_offset() == frame.storage_offset()
        return torch.cat(outputs)

    return trace(run, [network], [clip], device=device), len(gone_through)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_module_that_fills_a_list_is_gone_through_until_it_fills_it_alike(device):
    expected, all_calls = frame_by_frame(frames=9, device=device, is_watched=True)
    traced, calls = frame_by_frame(frames=9, device=device, is_watched=False)
    assert (calls, all_calls) == (2, 9)
    assert traced.call == expected.call
    work = [[segment.work for segment in each.segments if segment.inside] for each in (traced, expected)]
    assert work[0] == work[1]
