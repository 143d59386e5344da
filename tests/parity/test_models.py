"""Whole models against the peer's, in fp32: U-Net, autoencoder, safety checker; each also with ours broken."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests import tiny
from tests.parity import pairs
from torch import nn

from lowtide.models import safety_checker
from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
SIZES = [(8, 8), (18, 22), (9, 7), (5, 16)]  # of latents: even, and such as halve to odd sizes
unets = cache(pairs.unets)
vaes = cache(pairs.vaes)


def unet_difference(kind="sd1", size=(8, 8), **changes):
    ours, theirs = unets(kind)
    inputs = {**tiny.unet_inputs(kind, size), **changes}
    return tiny.difference(ours(**inputs).sample, theirs(**inputs).sample)


@pytest.mark.parametrize("kind", tiny.UNETS)
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_unet(kind, size):
    assert unet_difference(kind, size) <= TOLERANCE


UNET_BREAKS = {
    "sine and cosine swapped": lambda model: pairs.swapped_halves(),
    "other frequencies": lambda model: pairs.shifted_frequencies(),
    "approximate GELU": lambda model: pairs.approximate_gelu(),
    "head size off by one": lambda model: pairs.unscaled_attention(),
    "skips swapped": lambda model: pairs.swapped_skips(),
    "layer norm's epsilon": lambda model: pairs.other_eps(model, nn.LayerNorm, 1e-6),
    "group norms' epsilon": lambda model: pairs.other_eps(model, nn.GroupNorm, 1e-6),
    "a bias off by a hundredth": lambda model: pairs.changed(
        model.mid_block.resnets[1].conv2, "bias", nn.Parameter(model.mid_block.resnets[1].conv2.bias * 1.01)
    ),
}


@pytest.mark.parametrize("kind", tiny.UNETS)
@pytest.mark.parametrize("name", UNET_BREAKS)
@torch.no_grad()
def test_comparison_sees_a_broken_unet(kind, name):
    """Negative control."""
    ours, theirs = unets(kind)
    inputs = tiny.unet_inputs(kind)
    expected = theirs(**inputs).sample
    with UNET_BREAKS[name](ours):
        assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE


TIMESTEPS = {
    "whole number": 481,
    "fraction": 481.25,
    "no axis": torch.tensor(481),
    "one": torch.tensor([481]),
    "fractional, one": torch.tensor([481.25]),
    "one each": torch.tensor([481, 17]),
    "int32": torch.tensor([481, 17], dtype=torch.int32),
}


@pytest.mark.parametrize("name", TIMESTEPS)
@torch.no_grad()
def test_every_form_of_timestep(name):
    assert unet_difference(timestep=TIMESTEPS[name]) <= TOLERANCE


@torch.no_grad()
def test_comparison_sees_another_timestep():
    """Negative control."""
    ours, theirs = unets("sd1")
    inputs = tiny.unet_inputs()
    expected = theirs(**inputs).sample
    for timestep in (482, torch.tensor([481, 480]), 481.05):
        assert tiny.difference(ours(**{**inputs, "timestep": timestep}).sample, expected) > TOLERANCE


@pytest.mark.parametrize("kind", tiny.UNETS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@torch.no_grad()
def test_mask_of_text_tokens(kind, dtype):
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0]]).to(dtype)
    assert unet_difference(kind, encoder_attention_mask=mask) <= TOLERANCE
    ours, theirs = unets(kind)  # negative control: without the mask, or with another
    inputs = tiny.unet_inputs(kind)
    expected = theirs(**inputs, encoder_attention_mask=mask).sample
    for other in (None, mask.flip(1)):
        assert tiny.difference(ours(**inputs, encoder_attention_mask=other).sample, expected) > TOLERANCE


@torch.no_grad()
def test_tuple_and_positional_arguments():
    ours, theirs = unets("sd1")
    inputs = tiny.unet_inputs().values()
    (a,), (b,) = ours(*inputs, return_dict=False), theirs(*inputs, return_dict=False)
    assert tiny.difference(a, b) <= TOLERANCE
    assert torch.equal(a, ours(*inputs).sample)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_time_embedding_of_other_configurations(flip, shift):
    ours, theirs = pairs.unets(flip_sin_to_cos=flip, freq_shift=shift)
    inputs = tiny.unet_inputs()
    expected = theirs(**inputs).sample
    assert tiny.difference(ours(**inputs).sample, expected) <= TOLERANCE
    for broken in (pairs.swapped_halves(), pairs.shifted_frequencies()):  # negative controls
        with broken:
            assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE


@torch.no_grad()
def test_added_conditions_matter():
    """SDXL's text and size terms: equal to the peer's, and each of them seen."""
    ours, theirs = unets("sdxl")
    inputs = tiny.unet_inputs("sdxl")
    expected = theirs(**inputs).sample
    for name, off in (("text_embeds", 0.01), ("time_ids", 1)):
        added = {**inputs["added_cond_kwargs"], name: inputs["added_cond_kwargs"][name] + off}
        changed = {**inputs, "added_cond_kwargs": added}
        assert tiny.difference(ours(**changed).sample, theirs(**changed).sample) <= TOLERANCE
        assert tiny.difference(ours(**changed).sample, expected) > TOLERANCE


@pytest.mark.parametrize("kind", tiny.VAES)
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
@torch.no_grad()
def test_autoencoder(kind, size):
    ours, theirs = vaes(kind)
    x = tiny.numbers((2, 3, *size))
    a, b = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    assert tiny.difference(a.mean, b.mean) <= TOLERANCE
    assert tiny.difference(a.std, b.std) <= TOLERANCE
    assert tiny.difference(a.kl(), b.kl()) <= TOLERANCE
    assert tiny.difference(a.sample(tiny.seeded(3)), b.sample(tiny.seeded(3))) <= TOLERANCE
    assert tiny.difference(a.sample(tiny.seeded(4)), b.sample(tiny.seeded(3))) > TOLERANCE  # negative control
    assert tiny.difference(ours.decode(b.mean).sample, theirs.decode(b.mean).sample) <= TOLERANCE
    assert tiny.difference(ours(x).sample, theirs(x).sample) <= TOLERANCE


VAE_BREAKS = {
    "norms' epsilon": pairs.other_group_eps,
    "head size off by one": lambda model: pairs.unscaled_attention(of="vae"),
    "padding": lambda model: pairs.symmetric_padding(),
}
BREAKS_OF = [
    (name, kind)
    for name in VAE_BREAKS
    for kind in tiny.VAES
    if (name, kind) != ("head size off by one", "no mid attention")
]


@pytest.mark.parametrize(("name", "kind"), BREAKS_OF)
@torch.no_grad()
def test_comparison_sees_a_broken_autoencoder(name, kind):
    """Negative control, with a faint picture, where a wrong epsilon is visible."""
    ours, theirs = vaes(kind)
    x, z = 0.01 * tiny.numbers((1, 3, 32, 32)), 0.01 * tiny.numbers((1, theirs.config.latent_channels, 8, 8))
    mean, decoded = theirs.encode(x).latent_dist.mean, theirs.decode(z).sample
    with VAE_BREAKS[name](ours):
        assert tiny.difference(ours.encode(x).latent_dist.mean, mean) > TOLERANCE
        if name != "padding":  # of the encoder alone
            assert tiny.difference(ours.decode(z).sample, decoded) > TOLERANCE


def verdicts(checker, pictures):
    return checker(pictures) if isinstance(checker, StableDiffusionSafetyChecker) else checker(pictures, pictures)[1]


PICTURES = 2 * tiny.numbers((60, 3, 16, 16), 9) * torch.linspace(0.1, 1.5, 60)[:, None, None, None]


@pytest.mark.parametrize("threshold", [0.5, 0.55, 0.6])
def test_safety_checker(threshold):
    ours, theirs = pairs.safety_checkers(threshold)
    expected = verdicts(theirs, PICTURES.clone())
    assert verdicts(ours, PICTURES) == expected
    assert 0 < sum(expected) < len(expected)


def test_comparison_sees_a_broken_safety_checker():
    """Negative control: no stricter margin near special concepts; a threshold off by a hundredth."""
    ours, theirs = pairs.safety_checkers(0.55)
    expected = verdicts(theirs, PICTURES.clone())
    with pairs.changed(safety_checker, "SPECIAL_MARGIN", 0.0):
        assert verdicts(ours, PICTURES) != expected
    with torch.no_grad():
        ours.concept_embeds_weights.add_(0.01)
    assert verdicts(ours, PICTURES) != expected


@pytest.mark.slow
@torch.no_grad()
def test_unet_of_stable_diffusion_at_full_width():
    """Stable Diffusion 1.5's own configuration, 860 million weights held once, on 8x8 latents."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768).eval()
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config({"cross_attention_dim": 768})
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert 859e6 < sum(parameter.numel() for parameter in ours.parameters()) < 860e6
    sample, context = tiny.numbers((1, 4, 8, 8), 1), tiny.numbers((1, 77, 768), 2)
    expected = theirs(sample, 481, context).sample
    assert tiny.difference(ours(sample, 481, context).sample, expected) <= TOLERANCE
    for broken in (pairs.swapped_halves(), pairs.approximate_gelu(), pairs.unscaled_attention()):  # negative controls
        with broken:
            assert tiny.difference(ours(sample, 481, context).sample, expected) > TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_of_stable_diffusion_at_full_width():
    """Stable Diffusion 1.5's own configuration on a picture of 64x64 pixels."""
    published = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**published).eval()
    with torch.device("meta"):
        ours = AutoencoderKL.from_config(published)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x, z = tiny.numbers((1, 3, 64, 64)), tiny.numbers((1, 4, 8, 8), 1)
    mean, decoded = theirs.encode(x).latent_dist.mean, theirs.decode(z).sample
    assert tiny.difference(ours.encode(x).latent_dist.mean, mean) <= TOLERANCE
    assert tiny.difference(ours.decode(z).sample, decoded) <= TOLERANCE
    with pairs.other_group_eps(ours):  # negative control
        assert tiny.difference(ours.encode(x).latent_dist.mean, mean) > TOLERANCE
        assert tiny.difference(ours.decode(z).sample, decoded) > TOLERANCE
