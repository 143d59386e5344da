"""Quantizing and dequantizing against plain arithmetic, to the bit, and the errors that are promised."""

from __future__ import annotations

import pytest
import torch

from lowtide.ops.quantization import CHUNK, STORAGE, dequantize, fits_bfloat16, fp8_linear, holds_nan, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = [(storage, scaled) for storage in STORAGE.values() for scaled in (True, False)]
FORMS.remove((torch.int8, False))


def drawn(*shape: int, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("storage", "scaled"), FORMS)
def test_dequantized_is_the_product_rounded_once(storage, scaled, dtype, layout, fits):
    weight = drawn(70, 40, 3, 3).to(memory_format=layout)
    weight[3] = 0
    weight[4] *= 1e-6
    values, scale = quantize(weight, storage, scaled=scaled)
    assert values.stride() == weight.stride()
    assert (scale is not None) == scaled == (scaled and fits_bfloat16(scale))
    out = dequantize(values, scale, torch.empty_like(weight, dtype=dtype), scale_fits=fits and scaled)
    product = values.double() if scale is None else values.double() * scale.double()
    assert torch.equal(out, product.to(dtype))
    assert bool(out.isfinite().all())


def test_every_pattern_of_e4m3fn():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    assert holds_nan(values)
    numbers = values.float().isfinite()
    for dtype in DTYPES:
        right = values.to(dtype)
        fast = dequantize(values, None, torch.empty(1, 256, dtype=dtype))
        assert torch.equal(fast[numbers], right[numbers])
        own = dequantize(values, None, torch.empty(1, 256, dtype=dtype), has_nan=True)
        assert torch.equal(own.isnan(), ~numbers)
        for scale in (torch.full((1, 1), 2.0**-12), torch.full((1, 1), 0.7)):
            product = (values.float() * scale).to(dtype)
            fast = dequantize(values, scale, torch.empty(1, 256, dtype=dtype), scale_fits=fits_bfloat16(scale))
            assert torch.equal(fast[numbers], product[numbers])
    assert not holds_nan(values[:, :127])


def test_scales_that_bfloat16_does_not_hold():
    assert not fits_bfloat16(torch.tensor([[0.7]]))
    assert not fits_bfloat16(torch.tensor([[2.0**7]]))  # 2¹²⁰ times this is too large
    assert not fits_bfloat16(None)
    assert fits_bfloat16(torch.tensor([[0.5], [2.0**-100]]))


@pytest.mark.parametrize("std", [0.001, 0.005, 0.02, 0.05])
@pytest.mark.parametrize(
    ("storage", "bar"), [(torch.float8_e4m3fn, 0.03), (torch.int8, 0.01), (torch.float8_e5m2, 0.06)]
)
def test_the_error_of_a_product_whatever_the_size_of_the_weights(storage, bar, std):
    weight, x = drawn(320, 1280, std=std), drawn(64, 1280, std=1, seed=1)
    exact = x @ weight.T
    for dtype in (torch.float32, torch.bfloat16):
        rounded = dequantize(*quantize(weight, storage, scaled=True), torch.empty_like(weight, dtype=dtype))
        assert (x @ rounded.float().T - exact).norm() / exact.norm() <= bar


def test_a_plain_cast_loses_small_weights():
    """The negative control: what a scale is for."""
    weight, x = drawn(320, 1280, std=0.001), drawn(64, 1280, std=1, seed=1)
    rounded = dequantize(*quantize(weight, torch.float8_e4m3fn, scaled=False), torch.empty_like(weight))
    assert (x @ (rounded - weight).T).norm() / (x @ weight.T).norm() > 0.5


@pytest.mark.parametrize("dim", [0, 1])
def test_channels_of_another_dimension_and_slabs(dim):
    weight = drawn(7, 5, CHUNK // 20) * torch.logspace(-6, 2, 7 if dim == 0 else 5).view(-1, *[1] * (2 - dim))
    values, scale = quantize(weight, torch.int8, scaled=True, channel_dim=dim)
    assert scale is not None
    assert scale.shape == ((7, 1, 1) if dim == 0 else (1, 5, 1))
    assert bool((values.abs().amax([one for one in range(3) if one != dim]) >= 126).all())
    error = dequantize(values, scale, torch.empty_like(weight)) - weight
    assert bool((error.abs() <= 0.51 * scale).all())


def test_rounded_to_another_dtype_before():
    weight = drawn(30, 50)
    for storage, scaled in FORMS:
        ours = quantize(weight, storage, scaled=scaled, dtype=torch.bfloat16)
        theirs = quantize(weight.bfloat16(), storage, scaled=scaled)
        assert torch.equal(ours[0].view(torch.int8), theirs[0].view(torch.int8))
        assert scaled is False or torch.equal(ours[1], theirs[1])


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="int8 without a scale is not possible"):
        quantize(drawn(2, 2), torch.int8, scaled=False)
    for bad in (float("nan"), float("inf")):
        weight = drawn(2, 2)
        weight[1, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, torch.int8, scaled=True)


def test_products_in_fp8():
    x, weight, bias = drawn(3, 9, 64, std=3).bfloat16(), drawn(48, 64), drawn(48, std=1).bfloat16()
    values, scale = quantize(weight, torch.float8_e4m3fn, scaled=True)
    assert scale is not None
    out = fp8_linear(x, values, scale, bias)
    row = 2.0 ** torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).double() / 448))
    small = (x.double() / row).float().to(torch.float8_e4m3fn).double() * row
    right = small @ (values.double() * scale.double()).T
    assert out.shape == (3, 9, 48)
    assert ((out.double() - bias.double() - right).norm() / right.norm()) < 0.006  # bfloat16 rounds sum and bias
    exact = x.double() @ weight.double().T
    assert 0.02 < (right - exact).norm() / exact.norm() < 0.045
    assert torch.equal(fp8_linear(torch.zeros_like(x), values, None, None), torch.zeros(3, 9, 48).bfloat16())
    assert fp8_linear(x[:0], values, scale, bias).shape == (0, 9, 48)
    with pytest.raises(ValueError, match="takes bfloat16"):
        fp8_linear(x.float(), values, scale, bias)
    for bad in (float("inf"), float("nan")):
        broken = x.clone()
        broken[1, 2, 3] = bad
        found = fp8_linear(broken, values, scale, bias)
        assert not bool(found[1, 2].isfinite().any())
        assert torch.equal(found[0], out[0])
