"""What kernels take that guests use and we do not: groups, maps with gaps, enlargements; never less than measured."""

import pytest
import torch
from tests.memory_peaks import peak_bytes

from lowtide.prediction.component import trace_call
from lowtide.prediction.convolutions import has_avx512

pytestmark = [
    pytest.mark.skipif(torch.get_num_threads() > 1, reason="kernels were measured with one thread"),
    pytest.mark.filterwarnings("ignore"),
]


def near(bound):
    """How many times the measured bytes a prediction may be: with AVX-512, where the rules were read from kernels.

    Elsewhere predictions are upper estimates.
    """
    return bound if has_avx512() else max(bound, 1.4)


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
    assert measured <= predicted <= near(1.02 if groups == channels else 1.6) * measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_clip_with_frames_outside_of_channels(kernel, dtype):
    """As video autoencoders leave it that double the frames: `[B, F, C, H, W]` seen as `[B, C, F, H, W]`."""
    x = torch.zeros(1, 4, 16, 24, 24, dtype=dtype).transpose(1, 2)
    weight = torch.zeros(16, 16, kernel, kernel, kernel, dtype=dtype)
    predicted, measured = peaks(torch.nn.functional.conv3d, x, weight)
    assert measured <= predicted <= near(1.05) * measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [300, 3000])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (7, 1, 9), (8, 4, 1), (1, 1, 1)])
def test_sound(kernel, stride, dilation, length, dtype):
    """Convolutions of one dimension are maps of one row to PyTorch, which decides by that who computes them.

    Where entries are left out, what kernels take beside depends on the processor's caches: there is an upper estimate.
    """
    x, weight = torch.zeros(1, 48, length, dtype=dtype), torch.zeros(32, 48, kernel, dtype=dtype)
    padding = (kernel - stride) * dilation // 2
    convolve = lambda x, weight: torch.nn.functional.conv1d(x, weight, None, stride, padding, dilation)  # noqa: E731
    predicted, measured = peaks(convolve, x, weight)
    is_estimate = (stride > 1 or dilation > 1) and (dtype is torch.bfloat16 or not has_avx512())
    assert measured <= predicted <= (3 if is_estimate else near(1.01 if dtype is torch.float32 else 1.4)) * measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [2, 8])
@pytest.mark.parametrize("shape", [(16, 64), (64, 1000), (32, 30, 40), (8, 2, 6, 6)], ids=str)
@pytest.mark.parametrize("is_last", [False, True])
def test_transposed(shape, kernel, dtype, is_last):
    x, dims = torch.zeros(1, *shape, dtype=dtype), len(shape) - 1
    weight = torch.zeros(shape[0], 16, *[kernel] * dims, dtype=dtype)
    if is_last and dims > 1:
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    enlarge = getattr(torch.nn.functional, f"conv_transpose{dims}d")
    predicted, measured = peaks(lambda x, weight: enlarge(x, weight, stride=max(2, kernel // 2)), x, weight)
    assert measured <= predicted <= near(1.05) * measured + 2**17


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_enlargement(mode, channels, layout):
    x = torch.zeros(1, channels, 32, 24).contiguous(memory_format=layout)
    predicted, measured = peaks(lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode=mode), x)
    assert measured <= predicted <= 1.02 * measured


@pytest.mark.parametrize("norm", [lambda x: torch.nn.functional.layer_norm(x, (16,)), lambda x: x.softmax(-1)])
@pytest.mark.parametrize("heads", [1, 3])
def test_norms_of_what_has_its_heads_outside(norm, heads):
    """As of keys that are `[B, N, L, H]` and lie as `[B, L, N, H]`."""
    x = torch.zeros(2, 300, heads, 16).transpose(1, 2)
    predicted, measured = peaks(norm, x)
    assert measured <= predicted <= 1.01 * measured
