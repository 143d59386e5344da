"""Products in 8 bits: near those of the numbers that were rounded, and each sample by itself."""

import pytest
import torch
import torch.nn.functional as F

from lowtide.ops import int8_products
from lowtide.ops.int8_products import (
    has_int8_products,
    int8_convolution,
    int8_product,
    pack_int8_convolution,
    pack_int8_product,
)

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="this processor has no instructions for it")
NEAR = 0.012
"""Error of results, of their spread: inputs are rounded to some 250 steps."""
GEOMETRIES = [((1, 1), (1, 1), (1, 1), 1), ((1, 1), (2, 2), (1, 1), 1), ((2, 2), (1, 1), (2, 2), 1)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator), 0.01 * torch.rand(
        shape[0], generator=generator
    ).add(0.5)


def error(result, expected):
    return ((result.float() - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(geometry, layout, dtype, monkeypatch):
    monkeypatch.setattr(int8_products, "CHUNK", 1000)
    x, (values, scale), bias = numbers(3, 24, 11, 9).contiguous(memory_format=layout), weight(40, 24, 3, 3), numbers(40)
    x = (x * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1)).to(dtype)
    packed = pack_int8_convolution(values, geometry, x.shape)
    result = int8_convolution(x, packed, scale, bias.to(dtype), geometry)
    padding, stride, dilation, _ = geometry
    expected = F.conv2d(x.float(), values * scale.view(-1, 1, 1, 1), bias.to(dtype).float(), stride, padding, dilation)
    assert result.dtype == dtype
    for place in range(3):
        assert error(result[place], expected[place]) < NEAR
        assert torch.equal(result[place], int8_convolution(x[place, None], packed, scale, bias.to(dtype), geometry)[0])
    assert error(result[0], 1.05 * expected[0]) > NEAR, "and not near whatever is computed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype, monkeypatch):
    monkeypatch.setattr(int8_products, "CHUNK", 200)
    x, (values, scale), bias = numbers(2, 7, 64), weight(48, 64), numbers(48)
    x = (x * numbers(2, 7, 1, seed=2).exp()).to(dtype)
    x[0, 0] = 0
    packed = pack_int8_product(values, 14)
    for given in (bias.to(dtype), None):
        result = int8_product(x, packed, scale, given)
        expected = F.linear(x.float(), values * scale[:, None], None if given is None else given.float())
        assert result.dtype == dtype
        assert error(result, expected) < NEAR
        assert torch.equal(result[1:], int8_product(x[1:], packed, scale, given))
        assert torch.equal(result[0, 0].float(), torch.zeros(48) if given is None else given.float())
    assert error(result, 1.05 * expected) > NEAR, "and not near whatever is computed"
    assert int8_product(x[:, :0], packed, scale, None).shape == (2, 0, 48)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    x, (values, scale) = numbers(2, 8, 6, 6), weight(16, 8, 3, 3)
    x[0, 3, 2, 2] = bad
    geometry = GEOMETRIES[0]
    result = int8_convolution(x, pack_int8_convolution(values, geometry, x.shape), scale, None, geometry)
    assert result[0].isnan().all()
    assert result[1].isfinite().all()
    rows, (values, scale) = numbers(3, 32), weight(16, 32)
    rows[1, 5] = bad
    result = int8_product(rows, pack_int8_product(values, 3), scale, None)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


def test_constant_maps():
    values, scale = weight(16, 8, 3, 3)
    geometry = GEOMETRIES[0]
    packed = pack_int8_convolution(values, geometry, torch.Size((1, 8, 6, 6)))
    for number in (0.0, 3.0, -2.0):
        x = torch.full((1, 8, 6, 6), number)
        expected = F.conv2d(x, values * scale.view(-1, 1, 1, 1), padding=1)
        assert torch.allclose(int8_convolution(x, packed, scale, None, geometry), expected, atol=0.02 * abs(number))
