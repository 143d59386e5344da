"""Layers and blocks of the U-Net and the autoencoder against the peer's, in fp32, each also with ours broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.parity import pairs
from torch import nn

from lowtide.models.layers import timestep_embedding
from lowtide.models.unet_blocks import DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D
from lowtide.models.unet_config import UNet2DConditionConfig

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
FAINT = 0.05  # inputs as faint as this make a wrong epsilon visible


@dataclass(frozen=True)
class Layer:
    """A submodule of a pair's models, its inputs' shapes, a way to break ours, and how each is called."""

    model: str
    path: str
    shapes: tuple[tuple[int, ...], ...]
    broken: Callable[[Any], Any]
    theirs: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
    ours: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)


def other_activation(_):
    return pairs.changed(F, "silu", lambda x, inplace=False: F.gelu(x))


def other_gelu(_):
    return pairs.approximate_gelu()


def other_scale(_):
    return pairs.unscaled_attention()


def fewer_heads(layer):
    return pairs.changed(layer, "heads", layer.heads // 2)


def group_eps(layer):
    return pairs.other_group_eps(layer)


def layer_eps(layer):
    return pairs.other_eps(layer, nn.LayerNorm, 1e-6)


def blurred(_):
    nearest = F.interpolate
    return pairs.changed(F, "interpolate", lambda x, mode, **size: nearest(x, mode="bilinear", **size))


def padded_elsewhere(layer):
    """Left and above where it is right and below; two to the left and above where it is one all round."""
    left = 1 if layer.conv.padding == (0, 0) else 2

    def forward(x):
        return F.conv2d(F.pad(x, (left, 0, left, 0)), layer.conv.weight, layer.conv.bias, stride=2)

    return pairs.changed(layer, "forward", forward)


def with_context(layer, x, context):
    return layer(x, encoder_hidden_states=context)


def with_context_tuple(layer, x, context):
    return layer(x, encoder_hidden_states=context, return_dict=False)[0]


ATTENTION = "down_blocks.0.attentions.0"
BLOCK = f"{ATTENTION}.transformer_blocks.0"
MAP, TOKENS, TIME, CONTEXT = (2, 8, 6, 5), (2, 9, 8), (2, 32), (2, 7, 24)
LAYERS = {
    "time embedding": Layer("sd1", "time_embedding", ((2, 8),), other_activation),
    "residual block": Layer("sd1", "down_blocks.0.resnets.0", (MAP, TIME), group_eps),
    "residual block, wider": Layer("sd1", "down_blocks.1.resnets.0", (MAP, TIME), other_activation),
    "residual block, no time": Layer(
        "vae", "encoder.down_blocks.0.resnets.0", (MAP,), group_eps, lambda layer, x: layer(x, None)
    ),
    "halving": Layer("sd1", "down_blocks.0.downsamplers.0", (MAP,), padded_elsewhere),
    "halving, right and below": Layer("vae", "encoder.down_blocks.0.downsamplers.0", (MAP,), padded_elsewhere),
    "doubling": Layer("sd1", "up_blocks.0.upsamplers.0", ((2, 24, 3, 4),), blurred),
    "enlarging to a size": Layer(
        "sd1",
        "up_blocks.0.upsamplers.0",
        ((2, 24, 3, 4),),
        blurred,
        lambda layer, x: layer(x, output_size=(5, 7)),
        lambda layer, x: layer(x, (5, 7)),
    ),
    "self-attention": Layer("sd1", f"{BLOCK}.attn1", (TOKENS,), other_scale),
    "cross-attention": Layer("sd1", f"{BLOCK}.attn2", (TOKENS, CONTEXT), fewer_heads),
    "gated linear unit": Layer("sd1", f"{BLOCK}.ff.net.0", (TOKENS,), other_gelu),
    "feed-forward": Layer("sd1", f"{BLOCK}.ff", (TOKENS,), other_gelu),
    "transformer block": Layer("sd1", BLOCK, (TOKENS, CONTEXT), layer_eps, with_context),
    "transformer, convolutions": Layer("sd1", ATTENTION, (MAP, CONTEXT), group_eps, with_context_tuple),
    "transformer, linear": Layer("sd2", ATTENTION, (MAP, CONTEXT), group_eps, with_context_tuple),
    "transformer, three layers": Layer(
        "sdxl", "down_blocks.2.attentions.1", ((2, 24, 6, 5), CONTEXT), layer_eps, with_context_tuple
    ),
    "pixels' attention": Layer("vae", "decoder.mid_block.attentions.0", ((2, 16, 6, 5),), group_eps),
    "pixels' attention, scores": Layer(
        "vae", "decoder.mid_block.attentions.0", ((2, 16, 6, 5),), lambda _: pairs.unscaled_attention(of="vae")
    ),
}


@cache
def pair_of(name):
    return pairs.vaes() if name == "vae" else pairs.unets(name)


def layer_of(case):
    """Our layer, the peer's, and the inputs: loud for most, faint where an epsilon is broken."""
    ours, theirs = (model.get_submodule(case.path) for model in pair_of(case.model))
    loudness = FAINT if case.broken in (group_eps, layer_eps) else 3.0
    return ours, theirs, [loudness * tiny.numbers(shape, i) for i, shape in enumerate(case.shapes)]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layer(name):
    ours, theirs, inputs = layer_of(LAYERS[name])
    assert tiny.difference(LAYERS[name].ours(ours, *inputs), LAYERS[name].theirs(theirs, *inputs)) <= TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_comparison_sees_a_broken_layer(name):
    """Negative control."""
    case = LAYERS[name]
    ours, theirs, inputs = layer_of(case)
    expected = case.theirs(theirs, *inputs)
    with case.broken(ours):
        assert tiny.difference(case.ours(ours, *inputs), expected) > TOLERANCE


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1, 0.5])
def test_timestep_embedding(dim, flip, shift):
    timesteps = torch.tensor([0, 1, 481.25, 999])
    ours = timestep_embedding(timesteps, dim, flip_sin_to_cos=flip, freq_shift=shift)
    swapped = timestep_embedding(timesteps, dim, flip_sin_to_cos=not flip, freq_shift=shift)
    shifted = timestep_embedding(timesteps, dim, flip_sin_to_cos=flip, freq_shift=shift + 0.001)
    theirs = diffusers.models.embeddings.get_timestep_embedding(
        timesteps, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    assert tiny.difference(ours, theirs) <= TOLERANCE
    assert tiny.difference(swapped, theirs) > TOLERANCE  # negative controls
    assert tiny.difference(shifted, theirs) > TOLERANCE


@cache
@torch.no_grad()
def recorded(kind):
    """What each block of the peer's U-Net was given, by name, and gave, on a map that halves to odd sizes."""
    _, theirs = pair_of(kind)
    calls = {}

    def keep(path):
        return lambda block, args, kwargs, output: calls.update(
            {path: ({"hidden_states": args[0], "temb": args[1]} if args else kwargs, output)}
        )

    hooks = [theirs.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True) for path in paths(kind)]
    theirs(**tiny.unet_inputs(kind, size=(9, 14)))
    for hook in hooks:
        hook.remove()
    return calls


def paths(kind):
    levels = range(len(tiny.UNETS[kind]["block_out_channels"]))
    return [*(f"down_blocks.{i}" for i in levels), "mid_block", *(f"up_blocks.{i}" for i in levels)]


def run_block(block, kind, call):
    """Our block on the inputs of a recorded call, and what it returned as one list of tensors."""
    x, time, context = call["hidden_states"], call["temb"], tiny.unet_inputs(kind)["encoder_hidden_states"]
    if isinstance(block, UNetMidBlock2DCrossAttn):
        return [block(x, time, context, None)]
    if isinstance(block, DownBlock2D):
        x, skips = block(x, time, context, None)
        return [x, *skips]
    size = call.get("upsample_size") or [2 * side for side in x.shape[2:]]
    skips = [torch.empty(1, 1, *size), *call["res_hidden_states_tuple"]]  # the next level's map gives the size
    return [block(x, skips, time, context, None)]


def block_difference(kind, path, broken=None):
    block = pair_of(kind)[0].get_submodule(path)
    call, expected = recorded(kind)[path]
    expected = [expected[0], *expected[1]] if isinstance(block, DownBlock2D) else [expected]
    if broken is None:
        ours = run_block(block, kind, call)
    else:
        with broken(block):
            ours = run_block(block, kind, call)
    return max(tiny.difference(a, b) for a, b in zip(ours, expected, strict=True))


def swapped_skips(_):
    return pairs.swapped_skips()


def silenced_time(block):
    return pairs.changed(block.resnets[0], "time_emb_proj", None)


BLOCKS = [(kind, path) for kind in tiny.UNETS for path in paths(kind)]


@pytest.mark.parametrize(("kind", "path"), BLOCKS)
@torch.no_grad()
def test_block(kind, path):
    assert block_difference(kind, path) <= TOLERANCE


@pytest.mark.parametrize(("kind", "path"), BLOCKS)
@torch.no_grad()
def test_comparison_sees_a_broken_block(kind, path):
    """Negative control: no time in the first residual block; swapped skips; another GELU or activation."""
    block = pair_of(kind)[0].get_submodule(path)
    inner = other_activation if block.attentions is None else other_gelu
    for broken in (silenced_time, inner, *([swapped_skips] if isinstance(block, UpBlock2D) else [])):
        assert block_difference(kind, path, broken) > TOLERANCE


VAE_BLOCKS = {
    "encoder.down_blocks.0": ((2, 8, 6, 8), lambda block: padded_elsewhere(block.downsamplers[0])),
    "encoder.down_blocks.2": ((2, 8, 6, 8), group_eps),
    "encoder.mid_block": ((2, 16, 6, 8), lambda _: pairs.unscaled_attention(of="vae")),
    "decoder.mid_block": ((2, 16, 6, 8), group_eps),
    "decoder.up_blocks.0": ((2, 16, 6, 8), blurred),
    "decoder.up_blocks.2": ((2, 8, 6, 8), group_eps),
}


@pytest.mark.parametrize("path", VAE_BLOCKS)
@torch.no_grad()
def test_autoencoder_block(path):
    shape, broken = VAE_BLOCKS[path]
    ours, theirs = (model.get_submodule(path) for model in pair_of("vae"))
    x = (FAINT if broken is group_eps else 1) * tiny.numbers(shape)
    expected = theirs(x, temb=None) if path.startswith("decoder.up") else theirs(x)
    assert tiny.difference(ours(x), expected) <= TOLERANCE
    with broken(ours):  # negative control
        assert tiny.difference(ours(x), expected) > TOLERANCE


SD15 = UNet2DConditionConfig(cross_attention_dim=768)


@pytest.mark.slow
@torch.no_grad()
def test_true_shapes_of_stable_diffusion_at_its_finest_level():
    """The first blocks down and the last up of Stable Diffusion 1.5: 320 channels, 8 heads, 77 tokens of 768."""
    from diffusers.models.unets import unet_2d_blocks as blocks

    kind = {"num_attention_heads": 8, "cross_attention_dim": 768, "temb_channels": 1280, "resnet_eps": 1e-5}
    down = blocks.CrossAttnDownBlock2D(in_channels=320, out_channels=320, num_layers=2, **kind)
    up = blocks.CrossAttnUpBlock2D(
        in_channels=320, out_channels=320, prev_output_channel=640, num_layers=3, add_upsample=False, **kind
    )
    ours_down, ours_up = DownBlock2D(SD15, 0), UpBlock2D(SD15, 3)
    for ours, theirs in ((ours_down, down), (ours_up, up)):
        pairs.same_weights(tiny.set_weights(ours), tiny.set_weights(theirs))
    x, wide, time, context = (
        tiny.numbers(shape, i) for i, shape in enumerate([(1, 320, 16, 16), (1, 640, 16, 16), (1, 1280), (1, 77, 768)])
    )
    theirs, their_skips = down(x, temb=time, encoder_hidden_states=context)
    ours, our_skips = ours_down(x, time, context, None)
    assert (
        max(tiny.difference(a, b) for a, b in zip([ours, *our_skips], [theirs, *their_skips], strict=True)) <= TOLERANCE
    )
    skips = (x, *their_skips[:2])
    expected = up(wide, res_hidden_states_tuple=skips, temb=time, encoder_hidden_states=context)
    assert tiny.difference(ours_up(wide, list(skips), time, context, None), expected) <= TOLERANCE
    for broken in (pairs.swapped_skips(), pairs.unscaled_attention(), pairs.approximate_gelu()):
        with broken:  # negative controls
            assert tiny.difference(ours_up(wide, list(skips), time, context, None), expected) > TOLERANCE
