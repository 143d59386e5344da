"""Our models and the peer's with the same configuration and the same weights, and ways to break ours on purpose."""

from __future__ import annotations

import math
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tests import tiny
from torch import nn

from lowtide.models import layers, unet, vae
from lowtide.schedulers import noise_schedule


def of_transformers(component):
    """The class of `transformers` with the weights and files of one of ours."""
    import transformers

    name = type(component).__name__
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        return cls.from_pretrained(folder)


def safety_checkers(threshold=0.7):
    """Our safety checker and the peer's."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    theirs = tiny.safety_checker(threshold, lambda entries: StableDiffusionSafetyChecker(CLIPConfig(**entries)))
    return tiny.safety_checker(threshold), theirs


def unets(kind="sd1", **changes):
    """Our U-Net and the peer's."""
    import diffusers

    entries = {**tiny.UNETS[kind], **changes}
    theirs = tiny.set_weights(diffusers.UNet2DConditionModel(**entries))
    return same_weights(tiny.unet(kind, **changes), theirs)


def vaes(kind="sd1", **changes):
    """Our autoencoder and the peer's."""
    import diffusers

    theirs = tiny.set_weights(diffusers.AutoencoderKL(**{**tiny.VAES[kind], **changes}))
    return same_weights(tiny.vae(kind, **changes), theirs)


def video_transformers(kind="5b", **changes):
    """Our video transformer and the peer's."""
    import diffusers

    theirs = tiny.set_weights(diffusers.CogVideoXTransformer3DModel(**{**tiny.TRANSFORMERS[kind], **changes}))
    return same_weights(tiny.video_transformer(kind, **changes), theirs)


def same_weights(ours, theirs):
    """The pair, once it is sure that both have the same names and values."""
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    return ours, theirs


@contextmanager
def changed(owner, name, value):
    """For a while, `owner.name` is `value`."""
    with mock.patch.object(owner, name, value):
        yield


@contextmanager
def other_eps(model, kind, eps):
    """For a while, the norms of one kind in `model` have another epsilon."""
    norms = [module for module in model.modules() if isinstance(module, kind)]
    before = [norm.eps for norm in norms]
    assert norms
    try:
        for norm in norms:
            norm.eps = eps
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.eps = old


def swapped_halves(module=unet):
    """Sine and cosine change places in the time embedding."""
    whole = layers.timestep_embedding

    def swapped(timesteps, dim, *, flip_sin_to_cos, freq_shift):
        return whole(timesteps, dim, flip_sin_to_cos=not flip_sin_to_cos, freq_shift=freq_shift)

    return changed(module, "timestep_embedding", swapped)


def shifted_frequencies():
    """The time embedding's frequencies are those of Ho et al. and not of Stable Diffusion."""
    whole = layers.timestep_embedding

    def shifted(timesteps, dim, *, flip_sin_to_cos, freq_shift):
        return whole(timesteps, dim, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift + 1)

    return changed(unet, "timestep_embedding", shifted)


def approximate_gelu():
    """GELU by its usual approximation with tanh."""
    exact = F.gelu
    return changed(F, "gelu", lambda x: exact(x, approximate="tanh"))


def unscaled_attention(of="unet"):
    """The scores are divided by the square root of a head size that is larger by one."""

    def attention(q, k, v, mask=None, backend=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / math.sqrt(q.shape[-1] + 1))

    return changed({"unet": layers, "vae": vae}[of], "attention", attention)


def symmetric_padding():
    """The encoder pads all round before it halves, instead of right and below only."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.conv.weight, self.conv.bias, stride=2)

    return changed(vae.Downsample2D, "forward", forward)


def swapped_skips():
    """The skips come back in the order in which they were kept, as far as the shapes allow it."""
    whole = torch.cat
    return changed(torch, "cat", lambda tensors, dim=0: whole(tensors[::-1] if dim == 1 else tensors, dim=dim))


def other_group_eps(model):
    """Group norms with 1e-6 where it is 1e-5, and the other way round."""
    eps = next(module.eps for module in model.modules() if isinstance(module, nn.GroupNorm))
    return other_eps(model, nn.GroupNorm, 1e-6 if eps == 1e-5 else 1e-5)


def lent_quantiles(monkeypatch):
    """For a test: where scipy is missing, which the peer asks for quantiles of beta distributions, it is lent ours.

    `tests/schedulers/test_solver_options.py` compares them with scipy's.
    """
    from diffusers.schedulers import (
        scheduling_dpmsolver_multistep,
        scheduling_euler_discrete,
        scheduling_unipc_multistep,
    )

    beta = SimpleNamespace(ppf=lambda share, a, b: float(noise_schedule.beta_quantiles(np.array(share), shape=a)))
    for module in (scheduling_dpmsolver_multistep, scheduling_euler_discrete, scheduling_unipc_multistep):
        if not module.is_scipy_available():
            monkeypatch.setattr(module, "is_scipy_available", lambda: True)
            monkeypatch.setattr(module, "scipy", SimpleNamespace(stats=SimpleNamespace(beta=beta)), raising=False)
