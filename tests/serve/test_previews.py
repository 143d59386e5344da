"""Previews: small pictures of latents, by what was learned from pictures that were made."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lowtide.serve.previews import Previews, latent_grid

MIXED = torch.tensor([[0.3, -0.1, 0.2], [0.1, 0.2, -0.3], [-0.2, 0.3, 0.1], [0.1, 0.1, 0.1]])


def latents(seed, size=(8, 12)):
    return 0.4 * torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))


def picture(z):
    """What a decoder that is linear would make of latents, eight pixels for each."""
    colours = (z[0].movedim(0, -1) @ MIXED + 0.5).clamp(0, 1)
    return Image.fromarray((colours * 255).round().to(torch.uint8).numpy()).resize((96, 64), Image.Resampling.NEAREST)


def pixels(png):
    return np.array(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def difference(previews, seed):
    made = pixels(previews.png(latents(seed), 96, 64))
    return np.abs(made - np.array(picture(latents(seed)).resize((12, 8), Image.Resampling.BOX))).mean()


def test_they_are_learned_from_pictures(tmp_path):
    previews = Previews(tmp_path / "notes" / "model.safetensors", 4)
    before = difference(previews, 9)
    for seed in range(3):
        previews.learn(latents(seed), picture(latents(seed)))
    assert difference(previews, 9) < 4 < before
    assert difference(Previews(tmp_path / "notes" / "model.safetensors", 4), 9) < 4, "and kept"


def test_a_file_that_is_broken_is_learned_anew(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    previews = Previews(tmp_path / "model.safetensors")
    previews.learn(latents(0), picture(latents(0)))
    assert difference(previews, 0) < 4


@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [
        ((1, 4, 8, 12), (96, 64), (8, 12, 4)),
        ((2, 16, 5, 8, 12), (96, 64), (8, 12, 16)),
        ((2, 5, 16, 8, 12), (96, 64), (8, 12, 16)),
        ((1, 96, 64), (96, 64), (8, 12, 64)),
        ((1, 97, 64), (96, 64), None),
        ((1, 96, 64), (None, None), None),
        ((0, 4, 8, 8), (64, 64), None),
    ],
)
def test_latents_in_every_form(shape, size, grid):
    found = latent_grid(torch.zeros(shape), *size, 16 if 16 in shape else None)
    assert (None if found is None else tuple(found.shape)) == grid


def test_what_is_no_tensor_has_no_preview(tmp_path):
    assert Previews(tmp_path / "x").png(None, 64, 64) is None
