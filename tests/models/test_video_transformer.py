"""What the video transformer promises beyond its numbers: configurations, arguments, and what depends on what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.models.test_configs import ANYTHING

from lowtide.loading.components import MODELS
from lowtide.memory.blocks import blocks_of
from lowtide.models.video_positions import SLAB, rotary_embedding, rotate
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig

KINDS = list(tiny.TRANSFORMERS)
SHARED = {
    "_class_name": "CogVideoXTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "out_channels": 16,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
OLDER = {"sample_frames": 49, "sample_height": 60, "sample_width": 90}
NEWER = {"sample_frames": 81, "sample_height": 300, "sample_width": 300, "patch_size_t": 2, "patch_bias": False}
ROTARY = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
PUBLISHED = {  # and their weights, in millions
    "2b": ({**SHARED, **OLDER, "num_attention_heads": 30, "num_layers": 30}, 1693),
    "5b": ({**SHARED, **OLDER, **ROTARY}, 5570),
    "1.5": ({**SHARED, **NEWER, **ROTARY, "ofs_embed_dim": None, "use_learned_positional_embeddings": False}, 5570),
}


@pytest.fixture(scope="module")
def model():
    return tiny.video_transformer()


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configurations(kind):
    entries, millions = PUBLISHED[kind]
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(entries)
    assert sum(parameter.numel() for parameter in model.parameters()) // 1_000_000 == millions
    assert not list(model.buffers())
    written = model.config.to_dict()
    assert {key: written[key] for key in entries if key != "_class_name"} == {
        key: value for key, value in entries.items() if key != "_class_name"
    }
    [blocks] = blocks_of(model)
    assert blocks == list(model.transformer_blocks)
    assert MODELS["CogVideoXTransformer3DModel"] is CogVideoXTransformer3DModel


OTHER = {
    "activation_fn": "gelu",
    "dropout": 0.1,
    "norm_elementwise_affine": False,
    "timestep_activation_fn": "gelu",
}


@pytest.mark.parametrize("key", CogVideoXTransformer3DConfig.SUPPORTED)
def test_an_entry_that_changes_the_network_is_refused_and_its_usual_values_are_not(key):
    with pytest.raises(ValueError, match=rf"Video transformer config: {key}=.* is not supported; possible: "):
        CogVideoXTransformer3DConfig.from_dict({**tiny.VIDEO, key: OTHER[key]})
    for usual in CogVideoXTransformer3DConfig.SUPPORTED[key]:
        CogVideoXTransformer3DConfig.from_dict({**tiny.VIDEO, key: usual})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 is not possible; it must be a whole number from 1"),
        ({"out_channels": None}, "out_channels=None"),
        ({"patch_size_t": 2}, "patch_size_t without use_rotary_positional_embeddings"),
        ({"use_learned_positional_embeddings": True}, "without use_rotary_positional_embeddings"),
        ({**tiny.TRANSFORMERS["picture"], "patch_size_t": 2}, "patch_size_t with use_learned_positional_embeddings"),
        ({"ofs_embed_dim": 8}, "ofs_embed_dim=8 must be null, or time_embed_dim=12"),
        ({"num_attention_heads": 3, "attention_head_dim": 8}, "=24 must be a multiple of 16"),
        ({**tiny.TRANSFORMERS["5b"], "attention_head_dim": 24}, "attention_head_dim=24 must be a multiple of 16"),
        ({"temporal_interpolation_scale": 0}, "temporal_interpolation_scale=0 is not possible"),
        ({"spatial_interpolation_scale": float("nan")}, "spatial_interpolation_scale=nan is not possible"),
        ({"sample_height": 1}, "sample_height=1 is smaller than patch_size=2"),
    ],
)
def test_a_transformer_that_cannot_be_built(entries, message):
    with pytest.raises(ValueError, match=f"Video transformer config: .*{message}"):
        CogVideoXTransformer3DModel.from_config({**tiny.VIDEO, **entries})


@settings(max_examples=150)
@given(key=st.sampled_from(sorted(CogVideoXTransformer3DConfig.__dataclass_fields__)), value=ANYTHING)
def test_a_config_is_read_or_refused_whatever_it_holds(key, value):
    try:
        CogVideoXTransformer3DConfig.from_dict({**tiny.VIDEO, key: value})
    except ValueError as error:
        assert str(error).startswith("Video transformer config: ")  # noqa: PT017


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 8, 12), (1, 8, 12), (4, 8, 12)])
@torch.no_grad()
def test_latents_come_back_as_they_were(kind, size):
    model, inputs = tiny.video_transformer(kind), tiny.video_inputs(kind, size)
    output = model(**inputs).sample
    shape = inputs["hidden_states"].shape
    assert output.shape == (*shape[:2], 4, *shape[3:])
    assert output.isfinite().all()


@torch.no_grad()
def test_every_form_of_one_timestep_is_the_same(model):
    inputs = tiny.video_inputs()
    expected = model(**{**inputs, "timestep": torch.tensor([481, 481])}).sample
    for timestep in (481, 481.0, torch.tensor(481), torch.tensor([481])):
        assert torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)
    assert not torch.equal(model(**{**inputs, "timestep": 480}).sample, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_inputs_are_left_as_they_are_and_each_video_stands_alone(kind):
    model, inputs = tiny.video_transformer(kind), tiny.video_inputs(kind, batch=3)
    before = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    copies = {name: value.clone() for name, value in before.items()}
    together = model(**inputs).sample
    assert all(torch.equal(before[name], copies[name]) for name in copies)
    for i in range(3):
        part = {**inputs, **{name: before[name][i : i + 1] for name in before if len(before[name]) == 3}}
        assert tiny.difference(together[i : i + 1], model(**part).sample) < 1e-5
    assert tiny.difference(together[:1], together[1:2]) > 0.1


@torch.no_grad()
def test_text_may_be_of_any_length_but_for_learned_positions():
    for kind in ("2b", "5b"):
        inputs = tiny.video_inputs(kind)
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :3]
        assert tiny.video_transformer(kind)(**inputs).sample.isfinite().all()
    inputs = tiny.video_inputs("picture")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :3]
    with pytest.raises(ValueError, match="must have the 7 tokens"):
        tiny.video_transformer("picture")(**inputs)


WRONG = {
    "channels": ("5b", {"hidden_states": torch.zeros(1, 2, 5, 8, 12)}, r"hidden_states must be \[batch, frames, 4"),
    "axes": ("5b", {"hidden_states": torch.zeros(1, 4, 8, 12)}, "hidden_states must be"),
    "odd height": ("2b", {"hidden_states": torch.zeros(2, 2, 4, 7, 12)}, "2 frames, 7x12, do not split into patches"),
    "odd frames": ("1.5", {"hidden_states": torch.zeros(2, 3, 4, 8, 12)}, "3 frames, 8x12, do not split"),
    "no rotary": ("5b", {"image_rotary_emb": None}, "needs image_rotary_emb"),
    "rotary": ("2b", {"image_rotary_emb": (torch.zeros(1), torch.zeros(1))}, "takes no image_rotary_emb"),
    "other rotary": ("5b", {"image_rotary_emb": (torch.zeros(5, 16),) * 2}, r"tables of \[5, 16\] and \[5, 16\]; .*72"),
    "no ofs": ("picture 1.5", {"ofs": None}, "needs ofs"),
    "ofs": ("5b", {"ofs": 2.0}, "takes no ofs"),
    "condition": ("5b", {"timestep_cond": torch.zeros(2, 12)}, "timestep_cond and attention_kwargs are not possible"),
    "scale": ("5b", {"attention_kwargs": {"scale": 0.5}}, "timestep_cond and attention_kwargs are not possible"),
    "learned": ("picture", {"hidden_states": torch.zeros(2, 3, 8, 8, 10)}, "8x10 are not possible"),
}


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_arguments_that_do_not_fit(name):
    kind, changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        tiny.video_transformer(kind)(**{**tiny.video_inputs(kind), **changes})


def test_version_15_has_a_largest_size():
    config = CogVideoXTransformer3DConfig.from_dict(tiny.TRANSFORMERS["1.5"])
    with pytest.raises(ValueError, match="Latents of 10x12 are larger than the 8x12"):
        rotary_embedding(config, 10, 12, 2)
    with pytest.raises(ValueError, match="do not split into patches"):
        rotary_embedding(config, 8, 12, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_does_not_depend_on_its_slabs(dtype, monkeypatch):
    x, tables = tiny.numbers((2, 70, 3, 16)).to(dtype), (tiny.numbers((70, 16), 1), tiny.numbers((70, 16), 2))
    whole, parts = x.clone(), x.clone()
    rotate(whole, tables)
    monkeypatch.setattr("lowtide.models.video_positions.SLAB", 13)
    rotate(parts, tables)
    assert SLAB > 70
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["chunked", "math"])
@torch.no_grad()
def test_attention_can_be_chosen(kind, backend):
    model, inputs = tiny.video_transformer(kind), tiny.video_inputs(kind)
    expected = model(**inputs).sample
    model.set_attention_backend(backend, chunk_bytes=20_000)
    assert tiny.difference(model(**inputs).sample, expected) < 1e-5
    model.set_attention_backend("sdpa")
    model.enable_attention_slicing("max")
    assert tiny.difference(model(**inputs).sample, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_stays_near(kind):
    model, inputs = tiny.video_transformer(kind), tiny.video_inputs(kind)
    expected = model(**inputs).sample
    halved = {**inputs, **{name: inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}}
    output = model.to(torch.bfloat16)(**halved).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_can_learn_and_gradients_are_true(kind):
    """In-place changes do not disturb the backward pass: a directional derivative, in float64."""
    model = tiny.video_transformer(kind).double().requires_grad_(True)
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in tiny.video_inputs(kind).items()}

    def forward():
        return model(**inputs).sample.square().mean()

    forward().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name in ("transformer_blocks.1.norm1.linear.weight", "transformer_blocks.0.attn1.norm_q.weight"):
        weight, step = model.get_parameter(name), 1e-4
        direction = tiny.numbers(weight.shape, 7).double()
        with torch.no_grad():
            ahead = [float((weight.add_(direction * sign), forward())[1]) for sign in (step, -2 * step)]
            weight.add_(direction * step)
        numeric = (ahead[0] - ahead[1]) / (2 * step)
        assert weight.grad is not None
        assert abs(float((weight.grad * direction).sum()) - numeric) < 1e-3 * abs(numeric)
