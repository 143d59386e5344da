"""Positions, layers and blocks of the video transformer against the peer's, in fp32, each also with ours broken."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from tests.parity import pairs, video_breaks

from lowtide.models import video_positions
from lowtide.models.video_positions import add_sincos, rotary_embedding, sincos_table
from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
TEXT = 7  # tokens
transformers = cache(pairs.video_transformers)


def config_of(kind, **changes):
    return CogVideoXTransformer3DConfig.from_dict({**tiny.TRANSFORMERS[kind], **changes})


# ---- positions


def their_rotary(config, height, width, frames):
    """What the peer's pipeline passes to its transformer."""
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=config), vae_scale_factor_spatial=8)
    prepare = diffusers.CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * height, 8 * width, frames, torch.device("cpu"))


BIG = {"sample_height": 60, "sample_width": 90, "attention_head_dim": 64}
NEWER = {"sample_height": 300, "sample_width": 300, "attention_head_dim": 64}
ROTARY = [
    *(("5b", {}, size) for size in [(8, 12, 3), (8, 8, 1), (2, 12, 2), (16, 4, 5), (6, 10, 4), (2, 2, 7)]),
    *(("5b", BIG, size) for size in [(60, 90, 13), (32, 48, 3), (96, 170, 2), (90, 60, 13), (46, 62, 5)]),
    *(("1.5", {}, size) for size in [(8, 12, 4), (2, 4, 2), (6, 2, 8)]),
    *(("1.5", NEWER, size) for size in [(96, 170, 22), (60, 90, 2), (300, 300, 2)]),
]


@pytest.mark.parametrize(("kind", "changes", "size"), ROTARY)
def test_rotary_positions(kind, changes, size):
    config = config_of(kind, **changes)
    ours, theirs = rotary_embedding(config, *size), their_rotary(config, *size)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert tiny.difference(a, b) <= TOLERANCE
    assert tiny.difference(ours[1], theirs[0]) > TOLERANCE  # negative control


@pytest.mark.parametrize("broken", ["frames", "rows and columns", "theta", "corner"])
def test_comparison_sees_wrong_rotary_positions(broken):
    """Negative control."""
    config, size = config_of("5b"), (6, 10, 4)
    theirs = their_rotary(config, *size)
    whole = video_positions._angles
    breaks = {
        "frames": pairs.changed(torch, "arange", _later(torch.arange)),
        "rows and columns": pairs.changed(video_positions, "_fitted", _turned(video_positions._fitted)),
        "theta": pairs.changed(video_positions, "_angles", lambda positions, dim: whole(positions * 1.001, dim)),
        "corner": pairs.changed(video_positions, "_fitted", video_positions._counted),
    }
    with breaks[broken]:
        ours = rotary_embedding(config, *size)
    assert max(tiny.difference(a, b) for a, b in zip(ours, theirs, strict=True)) > TOLERANCE


def _later(arange):
    return lambda *args, **options: arange(*args, **options) + 1e-3


def _turned(fitted):
    def turned(config, rows, columns, device):
        other = fitted(config, columns, rows, device)
        return other[1] * 1.1, other[0]

    return turned


@pytest.mark.parametrize("grid", [(3, 4, 6), (2, 3, 2), (1, 1, 1), (4, 2, 5)])
def test_sincos_positions(grid):
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    config = config_of("2b", temporal_interpolation_scale=1.3)
    frames, rows, columns = grid
    theirs = get_3d_sincos_pos_embed(config.inner_dim, (columns, rows), frames, 1.875, 1.3, output_type="pt")
    ours = sincos_table(config, grid)
    assert tiny.difference(ours, theirs.flatten(0, 1)) <= TOLERANCE
    tokens = torch.zeros(1, *grid, config.inner_dim)
    add_sincos(tokens, config)
    assert torch.equal(tokens[0].flatten(0, 2), ours.float())
    if rows > 1 and rows != columns:  # negative control
        other = sincos_table(config, (frames, columns, rows)).unflatten(0, (frames, columns, rows)).transpose(1, 2)
        assert tiny.difference(other.flatten(0, 2), theirs.flatten(0, 1)) > TOLERANCE


# ---- layers and blocks


def joint(text, video):
    return torch.cat([text, video], dim=1)


VIDEO, TEXTS, TIME = (2, 24, 32), (2, TEXT, 32), (2, 12)
BLOCK = "transformer_blocks.1"


def tokens(loudness=1.0):
    return loudness * tiny.numbers(VIDEO, 1), loudness * tiny.numbers(TEXTS, 2), 3 * tiny.numbers(TIME, 3)


def rotary_of_tokens():
    return rotary_embedding(config_of("5b"), 8, 12, 1)


# Each gives a function that computes ours, and what the peer has computed.


def _norm_zero(pair, path, loudness=1.0):
    ours, theirs = (model.get_submodule(path) for model in pair)
    video, text, time = tokens(loudness)
    b = theirs(video, text, time)
    return lambda: ours(joint(text, video), time, TEXT), [joint(b[1], b[0]), b[3], b[2]]


def norm1(pair):
    return _norm_zero(pair, f"{BLOCK}.norm1")


def faint_norm2(pair):
    return _norm_zero(pair, f"{BLOCK}.norm2", 0.01)


def attention(pair):
    ours, theirs = (model.get_submodule(f"{BLOCK}.attn1") for model in pair)
    video, text, _ = tokens(3.0)
    out, text_out = theirs(video, encoder_hidden_states=text, image_rotary_emb=rotary_of_tokens())
    return lambda: [ours(joint(text, video), TEXT, rotary_of_tokens())], [joint(text_out, out)]


def attention_without_rotary(pair):
    ours, theirs = (model.get_submodule(f"{BLOCK}.attn1") for model in pair)
    video, text, _ = tokens(3.0)
    out, text_out = theirs(video, encoder_hidden_states=text)
    return lambda: [ours(joint(text, video), TEXT)], [joint(text_out, out)]


def feed_forward(pair):
    ours, theirs = (model.get_submodule(f"{BLOCK}.ff") for model in pair)
    video, _, _ = tokens(3.0)
    return lambda: [ours(video)], [theirs(video)]


def block(pair):
    ours, theirs = (model.get_submodule(BLOCK) for model in pair)
    video, text, time = tokens(1.7)
    out, text_out = theirs(video, text, time, rotary_of_tokens())
    return lambda: [ours(joint(text, video), time, TEXT, rotary_of_tokens())], [joint(text_out, out)]


def last_norm(pair):
    ours, theirs = (model.norm_out for model in pair)
    video, _, time = tokens(0.01)
    return lambda: [ours(video, time)], [theirs(video, temb=time)]


def time_embedding(pair):
    ours, theirs = (model.time_embedding for model in pair)
    x = tiny.numbers((2, 32))
    return lambda: [ours(x)], [theirs(x)]


def patches(pair):
    inputs = tiny.video_inputs("5b", (2, 6, 10))
    arguments = inputs["encoder_hidden_states"], inputs["hidden_states"]
    return lambda: [pair[0].patch_embed(*arguments)], [pair[1].patch_embed(*arguments)]


LAYERS = {
    "norm, scales and shifts": (norm1, video_breaks.other_activation),
    "norm of faint tokens": (faint_norm2, video_breaks.layer_eps),
    "attention": (attention, video_breaks.other_scale),
    "attention, rotation": (attention, video_breaks.turned_back),
    "attention without rotation": (attention_without_rotary, video_breaks.other_scale),
    "feed-forward": (feed_forward, video_breaks.exact_gelu),
    "block": (block, video_breaks.gates_swapped),
    "block, feed-forward": (block, video_breaks.exact_gelu),
    "last norm": (last_norm, video_breaks.layer_eps),
    "time embedding": (time_embedding, video_breaks.other_activation),
    "patches": (patches, video_breaks.shifted_convolution),
}


def worst(ours, theirs):
    return max(tiny.difference(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layer(name):
    compute, expected = LAYERS[name][0](transformers("5b"))
    assert worst(compute(), expected) <= TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_comparison_sees_a_broken_layer(name):
    """Negative control."""
    run, broken = LAYERS[name]
    compute, expected = run(transformers("5b"))
    with broken(transformers("5b")[0]):
        assert worst(compute(), expected) > TOLERANCE
