"""What convolutions by PyTorch's own loops take beside their inputs and outputs, also for a part of a map."""

import pytest
import torch
from tests.memory_peaks import peak_bytes

from lowtide.ops.convolution import channels_last
from lowtide.prediction.component import trace_call
from lowtide.prediction.multiplier import Multiplier

HALF = torch.bfloat16
SHAPES = {"map": (1, 16, 20, 24), "clip": (1, 16, 6, 20, 24)}
PARTS = {
    "whole": lambda x: x,
    "rows": lambda x: x[..., 2:14, :],
    "channels last": lambda x: x.contiguous(memory_format=channels_last(x)),
    "rows, channels last": lambda x: x.contiguous(memory_format=channels_last(x))[..., 2:14, :],
}
pytestmark = [
    pytest.mark.skipif(Multiplier.of(HALF) is not Multiplier.LOOPS, reason="oneDNN multiplies bfloat16 here"),
    pytest.mark.skipif(torch.get_num_threads() > 1, reason="scratchpads were measured with one thread"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_is_copied_where_it_has_gaps(shape, part, kernel):
    dims = len(SHAPES[shape]) - 2
    convolve = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d

    def call(x, weight):
        return convolve(PARTS[part](x), weight, padding=kernel // 2)

    inputs = torch.zeros(SHAPES[shape], dtype=HALF), torch.zeros((8, 16, *[kernel] * dims), dtype=HALF)
    meta = tuple(torch.empty_like(tensor, device="meta") for tensor in inputs)
    with torch.no_grad():
        measured = peak_bytes(lambda: call(*inputs)) + sum(tensor.nbytes for tensor in inputs)
        assert trace_call(lambda: call(*meta), (), meta).peak == measured
