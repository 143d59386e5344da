"""Blocks of 32 numbers against gguf's own reader and plain arithmetic, to the bit, and the errors that are promised."""

from __future__ import annotations

import pytest
import torch
from tests.memory_peaks import peak_bytes

from lowtide.ops.block_layout import LAYOUTS, Q4_0, Q8_0, in_whole_blocks
from lowtide.ops.block_quantization import dequantize_blocks, quantize_blocks
from lowtide.ops.quantization import CHUNK

BY_NAME = {layout.name: layout for layout in LAYOUTS.values()}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(*shape: int, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def numbers(blocks: torch.Tensor) -> torch.Tensor:
    """What blocks hold, `[rows, numbers of a row]` in float64, written down once more, plainly."""
    scale, codes = blocks[..., :2].contiguous().view(torch.float16).double(), blocks[..., 2:]
    if blocks.shape[-1] == Q8_0.nbytes:
        return (codes.contiguous().view(torch.int8).double() * scale).flatten(1)
    return ((torch.cat([codes % 16, codes // 16], -1).double() - 8) * scale).flatten(1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BY_NAME)
def test_dequantized_is_the_product_rounded_once(name, dtype, memory_format):
    weight = drawn(70, 64, 3, 3).to(memory_format=memory_format)
    weight[3] = 0
    weight[4] *= 1e-3
    blocks = quantize_blocks(weight, BY_NAME[name])
    assert blocks.shape == (70, 18, BY_NAME[name].nbytes)
    assert torch.equal(blocks, quantize_blocks(weight.contiguous(), BY_NAME[name]))  # of the order of dimensions
    out = dequantize_blocks(blocks, torch.empty_like(weight, dtype=dtype))
    assert out.stride() == weight.stride()
    assert torch.equal(out.flatten(1), numbers(blocks).to(dtype))
    assert not out[3].any()
    halves = torch.cat([blocks[..., :2], blocks[..., 2:].flip(-1)], -1)  # negative control: in another order
    assert not torch.equal(out, dequantize_blocks(halves, torch.empty_like(out)))


@pytest.mark.parametrize("name", BY_NAME)
def test_numbers_are_those_that_gguf_reads_and_writes(name):
    gguf = pytest.importorskip("gguf")
    kind, layout = gguf.GGMLQuantizationType[name], BY_NAME[name]
    weight = drawn(48, 320, seed=1)
    ours = quantize_blocks(weight, layout)
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind)).view(ours.shape)
    for blocks in (ours, theirs):
        right = torch.from_numpy(gguf.quants.dequantize(blocks.flatten(1).numpy(), kind))
        assert torch.equal(dequantize_blocks(blocks, torch.empty(weight.shape)), right)
    assert error(ours, weight) <= error(theirs, weight) * (0.96 if layout is Q4_0 else 1.01)


def error(blocks: torch.Tensor, weight: torch.Tensor) -> float:
    return float((dequantize_blocks(blocks, torch.empty(weight.shape)) - weight).norm() / weight.norm())


@pytest.mark.parametrize("std", [0.001, 0.005, 0.05, 3.0])
def test_relative_errors(std):
    """Of weights, and of products with them, whatever the size of the weights."""
    weight, x = drawn(256, 1280, std=std), drawn(64, 1280, std=1.0, seed=2)
    for layout, least, most in ((Q4_0, 0.080, 0.083), (Q8_0, 0.005, 0.006)):
        held = dequantize_blocks(quantize_blocks(weight, layout), torch.empty(weight.shape))
        assert least < (held - weight).norm() / weight.norm() < most
        assert least < (x @ held.T - x @ weight.T).norm() / (x @ weight.T).norm() < most + 0.002


def test_every_block_has_no_more_error_than_with_ggmls_scale():
    weight = drawn(64, 320)
    largest = weight.view(-1, 32).gather(1, weight.view(-1, 32).abs().argmax(1, keepdim=True))
    scale = (largest / -8).half().float()
    usual = ((weight.view(-1, 32) / scale).round().clamp(-8, 7) * scale - weight.view(-1, 32)).square().sum(1)
    held = dequantize_blocks(quantize_blocks(weight, Q4_0), torch.empty(weight.shape))
    ours = (held - weight).view(-1, 32).square().sum(1)
    assert bool((ours <= usual * (1 + 1e-5)).all())
    assert ours.sum() < 0.95 * usual.sum()


def test_rounded_to_the_dtype_that_computes_first():
    weight = drawn(8, 64)
    assert torch.equal(quantize_blocks(weight, Q4_0, torch.bfloat16), quantize_blocks(weight.bfloat16().float(), Q4_0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7])
@pytest.mark.parametrize("name", BY_NAME)
def test_what_has_no_scale_is_told(name, bad):
    weight = drawn(4, 64)
    weight[2, 40] = bad
    with pytest.raises(ValueError, match="not finite, or above"):
        quantize_blocks(weight, BY_NAME[name])


def test_memory_beside_the_result_is_that_of_few_numbers():
    weight = drawn(4096, 4096)
    blocks, out = quantize_blocks(weight, Q4_0), torch.empty(weight.shape)
    assert peak_bytes(lambda: dequantize_blocks(blocks, out)) <= 4.5 * CHUNK
    assert peak_bytes(lambda: quantize_blocks(weight, Q4_0)) - blocks.nbytes <= 10 * 4 * CHUNK


@pytest.mark.parametrize(
    ("shape", "is_whole"),
    [((320, 4, 3, 3), False), ((320, 320, 3, 3), True), ((8, 32), True), ((32, 8), False), ((32,), True)],
)
def test_rows_are_whole_blocks_or_not(shape, is_whole):
    assert in_whole_blocks(shape) == is_whole
    if is_whole:
        assert Q4_0.size(shape) == torch.Size(shape).numel() * 18 // 32
