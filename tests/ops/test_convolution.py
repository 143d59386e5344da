"""A convolution as a matrix product is the same convolution, and is taken only where it is meant to be."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lowtide.models.layers import Conv2d
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_vae_layers import FrameConv2d
from lowtide.ops.convolution import FEW_PIXELS, conv2d, conv2d_as_product, in_faster_layout

SHAPES = [  # batch, in, out, rows, columns, kernel, stride, padding
    (1, 3, 5, 4, 4, 3, 1, 1),
    (2, 4, 3, 7, 5, 3, 1, 1),
    (3, 2, 4, 8, 6, 3, 2, 1),
    (2, 5, 2, 9, 9, 3, 2, 0),
    (2, 6, 7, 3, 8, 1, 1, 0),
    (1, 4, 4, 1, 1, 3, 1, 1),
]


def example(shape, dtype):
    batch, channels, out, rows, columns, size, _, _ = shape
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(s, generator=draw, dtype=torch.float64)
        for s in ((batch, channels, rows, columns), (out, channels, size, size), (out,))
    )
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def relative_error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("map_layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_convolution(shape, weight_layout, map_layout):
    x, weight, bias = example(shape, torch.float64)
    x, weight = x.contiguous(memory_format=map_layout), weight.contiguous(memory_format=weight_layout)
    stride, padding = shape[-2:]
    result = conv2d_as_product(x, weight, bias, stride=stride, padding=padding)
    expected = F.conv2d(x, weight, bias, stride, padding)
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=map_layout)
    assert relative_error(result, expected) < 1e-14


def test_the_comparison_sees_a_turned_kernel():
    x, weight, bias = example(SHAPES[0], torch.float64)
    turned = conv2d_as_product(x, weight.transpose(2, 3), bias, stride=1, padding=1)
    assert relative_error(turned, F.conv2d(x, weight, bias, 1, 1)) > 0.1


def test_the_product_is_as_exact_as_the_kernel():
    x, weight, bias = example((2, 64, 48, 4, 4, 3, 1, 1), torch.bfloat16)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1)
    kernel = relative_error(F.conv2d(x, weight, bias, 1, 1), exact)
    assert relative_error(conv2d_as_product(x, weight, bias, stride=1, padding=1), exact) <= 1.05 * kernel


@pytest.mark.parametrize(
    ("dtype", "pixels", "layout", "taken"),
    [
        (torch.bfloat16, FEW_PIXELS, torch.contiguous_format, True),
        (torch.bfloat16, FEW_PIXELS + 1, torch.contiguous_format, False),
        (torch.bfloat16, FEW_PIXELS, torch.channels_last, True),
        (torch.float32, 1, torch.contiguous_format, False),
    ],
)
def test_the_product_is_taken_for_small_maps_in_bfloat16(monkeypatch, dtype, pixels, layout, taken):
    calls = []
    monkeypatch.setattr("lowtide.ops.convolution.conv2d_as_product", lambda *args, **_: calls.append(args))
    x = torch.ones(1, 2, 1, pixels, dtype=dtype).contiguous(memory_format=layout)
    conv2d(x, torch.ones(2, 2, 1, 1, dtype=dtype), torch.ones(2, dtype=dtype))
    assert bool(calls) == taken


def test_float32_is_pytorchs_own_to_the_bit():
    for shape in SHAPES:
        x, weight, bias = example(shape, torch.float32)
        stride, padding = shape[-2:]
        expected = F.conv2d(x, weight, bias, stride, padding)
        assert torch.equal(conv2d(x, weight, bias, (stride,) * 2, (padding,) * 2), expected)


def settings_of_scripts(layer):
    """What scripts set on every `nn.Conv2d` of a model, by name."""
    zeros = copy.deepcopy(layer)
    for mode in ("circular", "reflect", "replicate"):
        layer.padding_mode = mode
        yield mode, layer
    layer.padding_mode = "zeros"
    layer.stride = (1, 2)
    yield "stride", layer
    layer.stride, layer.dilation = (1, 1), (2, 2)
    yield "dilation", layer
    layer.dilation, layer.padding = (1, 1), "valid"
    yield "padding", layer
    layer.padding, layer.bias = (0, 1), None
    yield "no bias", layer
    zeros._conv_forward = lambda x, weight, bias: x * 2
    yield "_conv_forward", zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_scripts_set_on_a_convolution_is_done_as_by_the_parent_class(dtype):
    for size in (4, 20):  # bfloat16: as a product, and by the kernel
        x = torch.randn(1, 3, size, size).to(dtype)
        ours = Conv2d(3, 4, 3, padding=1).to(dtype).requires_grad_(False)
        before = ours(x)
        for name, layer in settings_of_scripts(ours):
            parents = torch.nn.Conv2d.__new__(torch.nn.Conv2d)
            parents.__dict__.update(vars(layer))
            expected = torch.nn.Conv2d.forward(parents, x)
            made = layer(x)
            assert made.shape == expected.shape, name
            assert relative_error(made, expected.double()) < (1e-6 if dtype == torch.float32 else 2e-2), name
            assert made.shape != before.shape or not torch.equal(made, before), name


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_convolution_of_frames_pads_as_its_parent_class(mode):
    layer = FrameConv2d(3, stride=1, padding=1).requires_grad_(False)
    x = torch.randn(2, 3, 4, 6, 5)
    parents = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode).requires_grad_(False)
    parents.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x)[:, :, 1], parents(x[:, :, 1]), atol=1e-3)
    layer.padding_mode = mode
    for frame in range(4):
        assert torch.allclose(layer(x)[:, :, frame], parents(x[:, :, frame]), atol=1e-5)


def test_a_function_that_a_script_put_in_pytorchs_place_convolves(monkeypatch):
    layer = Conv2d(2, 3, 3, padding=1).to(torch.bfloat16)
    monkeypatch.setattr(F, "conv2d", lambda x, *_: x[:, :1] * 7)
    x = torch.ones(1, 2, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(layer(x), x[:, :1] * 7)


def test_the_layer_keeps_the_names_and_learns():
    layer = Conv2d(2, 3, 3, stride=2, padding=1).to(torch.bfloat16)
    assert list(layer.state_dict()) == list(torch.nn.Conv2d(2, 3, 3).state_dict())
    result = layer(torch.ones(1, 2, 5, 5, dtype=torch.bfloat16))
    assert result.shape == (1, 3, 3, 3)
    result.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_the_layout_changes_for_bfloat16_alone():
    x = torch.randn(1, 4, 3, 5)
    assert in_faster_layout(x) is x
    half = x.to(torch.bfloat16)
    moved = in_faster_layout(half)
    assert torch.equal(moved, half)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_the_autoencoder_keeps_the_layout_to_its_end():
    config = {"block_out_channels": [32, 32], "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"] * 2}
    config["up_block_types"] = ["UpDecoderBlock2D"] * 2
    vae = AutoencoderKL.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        picture = vae.decode(torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)).sample
    assert picture.is_contiguous(memory_format=torch.channels_last)
