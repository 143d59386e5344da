"""What the autoencoder promises beyond its numbers: shapes, the distribution over latents, forms of its arguments."""

import pytest
import torch
from tests import tiny

from lowtide.models.model_outputs import DiagonalGaussianDistribution
from lowtide.models.vae import AutoencoderKL


@pytest.mark.parametrize("kind", tiny.VAES)
@torch.no_grad()
def test_shapes(kind):
    model = tiny.vae(kind)
    scale, channels = model.config.scale, model.config.latent_channels
    latents = model.encode(tiny.numbers((2, 3, 4 * scale, 6 * scale))).latent_dist.mode()
    assert latents.shape == (2, channels, 4, 6)
    assert model.decode(latents).sample.shape == (2, 3, 4 * scale, 6 * scale)


@torch.no_grad()
def test_forward_is_encode_then_decode():
    model, x = tiny.vae(), tiny.numbers((1, 3, 16, 16))
    posterior = model.encode(x).latent_dist
    assert torch.equal(model(x).sample, model.decode(posterior.mean).sample)
    drawn = model(x, sample_posterior=True, generator=tiny.seeded(1)).sample
    assert torch.equal(drawn, model.decode(posterior.sample(tiny.seeded(1))).sample)
    assert not torch.equal(drawn, model(x).sample)


@torch.no_grad()
def test_tuples_on_request():
    model, x = tiny.vae(), tiny.numbers((1, 3, 16, 16))
    (posterior,) = model.encode(x, return_dict=False)
    (decoded,) = model.decode(posterior.mean, return_dict=False)
    (both,) = model(x, return_dict=False)
    assert torch.equal(decoded, both)
    assert torch.equal(decoded, model(x).sample)


def test_the_distribution_over_latents():
    mean, logvar = torch.full((1, 1, 64, 64), 3.0), torch.full((1, 1, 64, 64), -2.0)
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    assert posterior.std[0, 0, 0, 0] == pytest.approx(torch.exp(torch.tensor(-1.0)).item())
    drawn = posterior.sample(tiny.seeded(0))
    assert drawn.mean() == pytest.approx(3.0, abs=0.05)
    assert drawn.std() == pytest.approx(posterior.std.mean().item(), rel=0.05)
    assert torch.equal(drawn, posterior.sample(tiny.seeded(0)))
    assert not torch.equal(drawn, posterior.sample())
    assert posterior.kl().item() == pytest.approx(64 * 64 * 0.5 * (9 + torch.exp(logvar[0, 0, 0, 0]).item() - 1 + 2))
    wild = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -1e9, 1e9]).reshape(1, 4, 1, 1))
    assert wild.std.isfinite().all()


@torch.no_grad()
def test_one_column_of_pixels_knows_only_its_neighbourhood_without_attention():
    """A decoder without attention and with group statistics held fixed is local: here, a far change is not seen."""
    model = tiny.vae("no mid attention")
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)):
        norm.forward = torch.clone
    z = tiny.numbers((1, 4, 4, 32))
    far = z.clone()
    far[..., -1] += 1
    one, other = model.decode(z).sample, model.decode(far).sample
    assert torch.equal(one[..., :32], other[..., :32])
    assert not torch.equal(one, other)


def test_fresh_weights_can_learn():
    model = AutoencoderKL.from_config(tiny.VAE)
    model(tiny.numbers((1, 3, 16, 16)), sample_posterior=True).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
