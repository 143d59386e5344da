"""The whole video transformer against the peer's, in fp32, each comparison also with ours broken."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests import tiny
from tests.parity import pairs, video_breaks
from torch import nn

from lowtide.models import video_layers, video_transformer
from lowtide.models.video_transformer import CogVideoXTransformer3DModel

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
KINDS = list(tiny.TRANSFORMERS)
SIZES = [(3, 8, 12), (2, 6, 4), (1, 2, 2), (4, 4, 10)]  # of latents: as configured, and others
transformers = cache(pairs.video_transformers)


def possible(kind, size):
    """The sizes that the peer takes: learned positions have one height and width, version 1.5 has a largest."""
    if kind == "picture":
        return size[1:] == (8, 12)
    return "1.5" not in kind or size[1:] <= (8, 12)


def difference(kind, size=(3, 8, 12), **changes):
    ours, theirs = transformers(kind)
    inputs = {**tiny.video_inputs(kind, size), **changes}
    return tiny.difference(ours(**inputs).sample, theirs(**inputs).sample)


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for kind in KINDS for size in [*SIZES, (2, 8, 12)] if possible(kind, size)]
)
@torch.no_grad()
def test_model(kind, size):
    assert difference(kind, size) <= TOLERANCE


MODEL_BREAKS = {
    "exact GELU": video_breaks.exact_gelu,
    "head size off by one": video_breaks.other_scale,
    "layer norms' epsilon": video_breaks.layer_eps,
    "gates of text and video swapped": video_breaks.gates_swapped,
    "sine and cosine swapped": lambda _: pairs.swapped_halves(video_transformer),
    "patches turned": video_breaks.shifted_convolution,
    "a bias off by a hundredth": lambda model: pairs.changed(
        model.transformer_blocks[1].ff.net[2], "bias", nn.Parameter(model.transformer_blocks[1].ff.net[2].bias * 1.01)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODEL_BREAKS)
@torch.no_grad()
def test_comparison_sees_a_broken_model(kind, name):
    """Negative control."""
    ours, theirs = transformers(kind)
    inputs = tiny.video_inputs(kind)
    expected = theirs(**inputs).sample
    with MODEL_BREAKS[name](ours):
        assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_comparison_sees_wrong_positions(kind):
    """Negative control: columns and rows exchanged, or positions left out."""
    ours, theirs = transformers(kind)
    inputs = tiny.video_inputs(kind, (2, 8, 12))
    expected = theirs(**inputs).sample
    if kind in ("2b", "picture"):
        with pairs.changed(video_layers, "add_sincos", lambda tokens, config: None):
            assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE
    if "image_rotary_emb" in inputs:
        cos, sin = inputs["image_rotary_emb"]
        inputs["image_rotary_emb"] = cos, -sin
        assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE


@torch.no_grad()
def test_comparison_sees_other_arguments():
    """Negative control: another time, another text, another `ofs`."""
    ours, theirs = transformers("picture 1.5")
    inputs = tiny.video_inputs("picture 1.5")
    expected = theirs(**inputs).sample
    for name, off in (("timestep", 1), ("ofs", 0.1), ("encoder_hidden_states", 0.01)):
        changed = {**inputs, name: inputs[name] + off}
        assert tiny.difference(ours(**changed).sample, expected) > TOLERANCE
        assert tiny.difference(ours(**changed).sample, theirs(**changed).sample) <= TOLERANCE


@pytest.mark.parametrize("changes", [{"flip_sin_to_cos": False}, {"freq_shift": 1}, {"attention_bias": False}])
@torch.no_grad()
def test_other_configurations(changes):
    ours, theirs = pairs.video_transformers("2b", **changes)
    inputs = tiny.video_inputs("2b")
    assert tiny.difference(ours(**inputs).sample, theirs(**inputs).sample) <= TOLERANCE


@torch.no_grad()
def test_tuple_and_positional_arguments():
    ours, theirs = transformers("2b")
    inputs = tiny.video_inputs("2b").values()
    (a,), (b,) = ours(*inputs, return_dict=False), theirs(*inputs, return_dict=False)
    assert tiny.difference(a, b) <= TOLERANCE
    assert torch.equal(a, ours(*inputs).sample)


WIDE = {
    "2b": {"num_attention_heads": 30},
    "5b": {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
    "1.5": {
        "num_attention_heads": 48,
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_height": 300,
        "sample_width": 300,
        "sample_frames": 81,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WIDE)
@torch.no_grad()
def test_published_widths(kind):
    """One layer of the published width, text of 226 tokens of 4096, small latents."""
    torch.manual_seed(0)
    config = {"num_layers": 1, "sample_height": 60, "sample_width": 90, **WIDE[kind]}
    if kind == "2b":
        config |= {"sample_height": 8, "sample_width": 12, "sample_frames": 9}  # its table would be 135 MB
    theirs = diffusers.CogVideoXTransformer3DModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        one = name.endswith("weight") and parameter.ndim == 1
        nn.init.normal_(parameter, mean=float(one), std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    with torch.device("meta"):
        ours = CogVideoXTransformer3DModel.from_config(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    inputs = tiny.video_inputs(size=(2, 6, 10), batch=1, config=ours.config)
    expected = theirs(**inputs).sample
    assert tiny.difference(ours(**inputs).sample, expected) <= TOLERANCE
    for broken in (
        video_breaks.other_activation,
        video_breaks.other_scale,
        video_breaks.gates_swapped,
    ):  # negative controls
        with broken(ours):
            assert tiny.difference(ours(**inputs).sample, expected) > TOLERANCE
