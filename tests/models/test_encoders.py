"""The encoders compute what the classes of `transformers` compute, to the bit, under the same names."""

import copy

import pytest
import torch
import transformers
from tests import tiny
from tests.thinned import thinned

from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.clip_vision import CLIPVisionModel
from lowtide.models.encoder_configs import ACTIVATIONS
from lowtide.models.t5 import T5EncoderModel
from lowtide.models.t5_layers import T5LayerNorm, bucket_of
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
VISION = {**tiny.VISION, "hidden_size": 64, "num_attention_heads": 4}
T5 = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
FORWARDS = ("relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu")
ENTRIES = ("last_hidden_state", "pooler_output", "hidden_states")


def pair(ours, theirs, dtype):
    """Both networks with the same weights, in a dtype."""
    tiny.set_weights(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def clips(dtype=torch.float32, **changes):
    entries = {**CLIP, **changes}
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**entries))
    return pair(CLIPTextModel.from_config(entries), theirs, dtype)


def t5s(dtype=torch.float32, **changes):
    entries = {**T5, **changes}
    theirs = transformers.T5EncoderModel(transformers.T5Config(**entries))
    return pair(T5EncoderModel.from_config(entries), theirs, dtype)


def same(ours, theirs):
    for name in ENTRIES:
        here, there = getattr(ours, name, None), getattr(theirs, name, None)
        assert (here is None) == (there is None), name
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x or () for x in (here, there)), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
    assert torch.equal(ours[0], theirs[0])
    assert len(ours.to_tuple()) == len(theirs.to_tuple())
    assert list(ours.keys()) == list(theirs.keys())


@pytest.mark.parametrize(("dtype", "act", "end"), thinned(DTYPES, ACTIVATIONS, (2, 99)))
@torch.no_grad()
def test_clip_reads_texts(dtype, act, end):
    ours, theirs = clips(DTYPES[dtype], hidden_act=act, eos_token_id=end)
    ids = torch.randint(3, 98, (2, 77), generator=tiny.seeded(1))
    ids[0, 20:], ids[1, 50:] = 99, 99
    for length in (77, 30, 1):
        cut = ids[:, :length].contiguous()
        same(ours(cut, output_hidden_states=True), theirs(cut, output_hidden_states=True))
        mask = (cut != 99).long()
        same(ours(cut, attention_mask=mask), theirs(cut, attention_mask=mask))


@pytest.mark.parametrize(("dtype", "act"), thinned(DTYPES, ACTIVATIONS))
@torch.no_grad()
def test_clip_sees_pictures(dtype, act):
    entries = {**VISION, "hidden_act": act}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**entries))
    ours, theirs = pair(CLIPVisionModel.from_config(entries), theirs, DTYPES[dtype])
    pixels = tiny.numbers((2, 3, 16, 16), 3)
    same(ours(pixels, output_hidden_states=True), theirs(pixels, output_hidden_states=True))
    with pytest.raises(ValueError, match="16x16 are needed"):
        ours(pixels[..., :8])


@pytest.mark.parametrize(("dtype", "forward", "wide"), thinned(DTYPES, FORWARDS, (False, True)))
@torch.no_grad()
def test_t5_reads_texts(dtype, forward, wide):
    """Also where states grow beyond float16, with the layer that overflows in float32 or not."""
    ours, theirs = t5s(DTYPES[dtype], feed_forward_proj=forward)
    for model in (ours, theirs):
        for block in model.encoder.block:
            layer = block.layer[1].DenseReluDense.wo
            layer.weight.mul_(3e4 if wide else 1)
            layer.to(torch.float32 if dtype == "float16" and not wide else DTYPES[dtype])
    for length in (226, 5, 1):
        ids = torch.randint(0, 100, (2, length), generator=tiny.seeded(length))
        same(ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True))
        mask = torch.ones_like(ids)
        mask[1, (length + 1) // 2 :] = 0
        same(ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask))


BROKEN = {
    "positions": (lambda model: model.embeddings.position_embedding.weight.add_(1e-3), clips),
    "causal": (lambda model: setattr(model.encoder.layers[1].self_attn, "causal", False), clips),
    "biases of distances": (lambda model: _attention(model).relative_attention_bias.weight.mul_(1.01), t5s),
    "buckets": (lambda model: setattr(_attention(model), "farthest", 100), t5s),
}


def _attention(model):
    return model.encoder.block[0].layer[0].SelfAttention


@pytest.mark.parametrize("name", BROKEN)
@torch.no_grad()
def test_damage_is_seen(name):
    damage, make = BROKEN[name]
    ours, theirs = make()
    ids = torch.arange(2, 72)[None]
    same(ours(ids), theirs(ids))
    damage(ours)
    assert not torch.equal(ours(ids)[0], theirs(ids)[0])


def test_distances_fall_into_buckets():
    for buckets, farthest in ((32, 128), (8, 20), (2, 1)):
        bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
        distances = torch.arange(-300, 301)
        if buckets > 2:  # the published function divides by nothing for two buckets
            assert torch.equal(bucket_of(distances, buckets, farthest), bucket(distances, True, buckets, farthest))


def test_outputs_by_name_and_by_place():
    ours, _ = clips(eos_token_id=99)
    ids = torch.tensor([[0, 5, 99, 99]])
    output = ours(ids, output_hidden_states=True)
    assert output["pooler_output"] is output[1] is output.pooler_output
    assert torch.equal(output[1], output[0][:, 2])
    assert len(output.hidden_states) == 4
    states, pooled = ours(ids, return_dict=False)
    assert torch.equal(states, output[0])
    assert torch.equal(pooled, output[1])
    with pytest.raises(ValueError, match="output_attentions=True is not possible"):
        ours(ids, output_attentions=True)
    with pytest.raises(ValueError, match="A text of 78 tokens is too long"):
        ours(torch.zeros(1, 78, dtype=torch.long))


def test_ends_of_texts():
    """The first of several end tokens; without any, the largest number, as in older configurations."""
    ids = torch.tensor([[0, 5, 98, 99, 99]])
    for end, place in (((98, 99), 2), (99, 3), (None, 3)):
        ours, _ = clips(eos_token_id=99)
        ours.eos_token_id = end
        output = ours(ids)
        assert torch.equal(output.pooler_output, output.last_hidden_state[:, place])


@torch.no_grad()
def test_embeddings_in_place_of_tokens():
    ours, theirs = t5s()
    embeds = ours.get_input_embeddings()(torch.arange(7)[None])
    same(ours(inputs_embeds=embeds), theirs(inputs_embeds=embeds))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours()


def test_a_norm_takes_no_mean():
    norm = T5LayerNorm(4, 0.0)
    assert torch.allclose(norm(torch.full((1, 1, 4), 3.0)), torch.ones(1, 1, 4))


@pytest.mark.parametrize("make", [clips, t5s], ids=["CLIP", "T5"])
def test_each_library_reads_what_the_other_wrote(tmp_path, make):
    ours, theirs = make(torch.bfloat16)
    ours.save_pretrained(tmp_path / "ours", variant="half", max_shard_size="60KB")
    theirs.save_pretrained(tmp_path / "theirs")
    here = type(ours).from_pretrained(tmp_path / "theirs", torch_dtype="auto")
    there = type(theirs).from_pretrained(tmp_path / "ours", variant="half", dtype="auto")
    for other in (here, there):
        assert other.dtype == torch.bfloat16
        assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in other.state_dict().items())
    with torch.no_grad():
        same(here(torch.arange(9)[None]), there(torch.arange(9)[None]))


def test_a_text_encoder_of_transformers_as_a_component(tmp_path):
    """It computes the same pictures, is kept by a save, and read again as ours."""
    pipe = tiny.pipeline(tmp_path / "words")
    config = transformers.CLIPTextConfig(**{**tiny.TEXT, "vocab_size": 518, "eos_token_id": 517, "bos_token_id": 516})
    theirs = transformers.CLIPTextModel(config).eval()
    theirs.load_state_dict(copy.deepcopy(pipe.text_encoder.state_dict()))
    call = {"prompt": "sea", "num_inference_steps": 1, "output_type": "pt"}
    expected = pipe(**call, generator=tiny.seeded(1)).images
    given = StableDiffusionPipeline(**{**pipe.components, "text_encoder": theirs})
    given.set_progress_bar_config(disable=True)
    assert torch.equal(given(**call, generator=tiny.seeded(1)).images, expected)
    given.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.text_encoder) is CLIPTextModel
    assert torch.equal(loaded(**call, generator=tiny.seeded(1)).images, expected)
