"""Row streaming at the true shapes of Stable Diffusion's autoencoder, with well-scaled weights: quality and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.activations.quality import psnr, worst

from lowtide.models.vae import AutoencoderKL

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode.py"
SHAPES = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512,
}
# Height and width in pixels; the last three are odd in one way or another.
SIZES = [(512, 512), (600, 880), (1024, 1024), (1536, 1536), (72, 1000), (1048, 8), (520, 776)]
LEAST_PSNR, MOST_ERROR = 120, 1e-4


@pytest.fixture(scope="module")
def model():
    return tiny.set_weights(AutoencoderKL.from_config(SHAPES))


@pytest.fixture(autouse=True)
def _two_threads_without_gradients():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def latents(height, width):
    """Noise around a tone that goes from dark to light over the picture."""
    slope = torch.linspace(-2, 2, width // 8) + torch.linspace(1, -1, height // 8)[:, None]
    return 1.7 * tiny.numbers((1, 4, height // 8, width // 8), 3) + slope


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_decoded_as_whole(model, size):
    z = latents(*size)
    whole = model.decode(z).sample
    model.enable_tiling("exact")
    try:
        ours = model.decode(z).sample
    finally:
        model.disable_tiling()
    assert psnr(ours, whole) >= LEAST_PSNR
    assert worst(ours, whole) <= MOST_ERROR
    if min(size) > 512:
        model.enable_tiling()
        tiled = model.decode(z).sample
        model.disable_tiling()
        assert psnr(tiled, whole) < 60, "a control: tiles with statistics of their own fail"
        assert worst(tiled, whole) > MOST_ERROR * 10


@pytest.mark.parametrize("size", [(512, 512), (264, 600)], ids=str)
def test_encoded_as_whole(model, size):
    x = tiny.numbers((1, 3, *size), 5)
    whole = model.encode(x).latent_dist.mean
    model.enable_tiling("exact", rows="disk")
    try:
        ours = model.encode(x).latent_dist.mean
    finally:
        model.disable_tiling()
    assert psnr(ours, whole) >= LEAST_PSNR
    assert worst(ours, whole) <= MOST_ERROR


def test_bfloat16_is_as_near_to_the_truth_as_the_whole_decode():
    model, z = tiny.set_weights(AutoencoderKL.from_config(SHAPES)), latents(512, 512)
    truth = model.decode(z).sample
    model.to(torch.bfloat16)
    whole = model.decode(z.bfloat16()).sample
    model.enable_tiling("exact")
    assert psnr(model.decode(z.bfloat16()).sample, truth) >= psnr(whole, truth)


@pytest.mark.parametrize(
    ("row", "size", "most"), [("exact", "1024x1024", 1.1 * 2**30), ("exact-disk", "1024x1024", 130e6)], ids=str
)
def test_memory_of_the_process(row, size, most):
    """The kernel's high-water mark above what was held before, in a process of its own."""
    command = [sys.executable, str(BENCHMARK), "--run", row, "--sizes", size]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["peak"] <= most
