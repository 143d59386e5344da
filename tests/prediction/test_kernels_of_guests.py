"""What kernels take that guests use and we do not: groups, maps with gaps, enlargements; never less than measured."""

import pytest
import torch
from tests.memory_peaks import peak_bytes

from lowtide.prediction.component import trace_call

pytestmark = [
    pytest.mark.skipif(torch.get_num_threads() > 1, reason="kernels were measured with one thread"),
    pytest.mark.filterwarnings("ignore"),
]
GROUPS = [(48, 48, 3), (24, 24, 3), (64, 8, 1), (64, 4, 3), (640, 640, 5)]


def peaks(call, *inputs):
    """Bytes alive at most: predicted and measured."""
    meta = tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in inputs)
    with torch.no_grad():
        call(*inputs)
        measured = peak_bytes(lambda: call(*inputs)) + sum(x.untyped_storage().nbytes() for x in inputs)
        return trace_call(lambda: call(*meta), (), meta).peak, measured


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(
    ("channels", "groups", "kernel"), [(48, 48, 3), (24, 24, 3), (64, 8, 1), (64, 4, 3), (640, 640, 5)]
)
def test_groups(channels, groups, kernel, layout):
    x = torch.zeros(1, channels, 32, 32).contiguous(memory_format=layout)
    weight = torch.zeros(channels, channels // groups, kernel, kernel)
    convolve = lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=kernel // 2, groups=groups)  # noqa: E731
    predicted, measured = peaks(convolve, x, weight)
    assert measured <= predicted <= (1.02 if groups == channels else 1.6) * measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_clip_with_frames_outside_of_channels(kernel, dtype):
    """As video autoencoders leave it that double the frames: `[B, F, C, H, W]` seen as `[B, C, F, H, W]`."""
    x = torch.zeros(1, 4, 16, 24, 24, dtype=dtype).transpose(1, 2)
    weight = torch.zeros(16, 16, kernel, kernel, kernel, dtype=dtype)
    predicted, measured = peaks(torch.nn.functional.conv3d, x, weight)
    assert measured <= predicted <= 1.05 * measured


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_enlargement(mode, channels, layout):
    x = torch.zeros(1, channels, 32, 24).contiguous(memory_format=layout)
    predicted, measured = peaks(lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode=mode), x)
    assert measured <= predicted <= 1.02 * measured
