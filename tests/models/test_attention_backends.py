"""Choosing attention: it reaches every layer of every network, can be undone, and bad names change nothing."""

import copy

import pytest
import torch
from tests import tiny

from lowtide.models import attention_backends
from lowtide.models.attention_backends import attention_modules, set_attention_backend, set_attention_slicing
from lowtide.ops.attention import DEFAULT, AttentionBackend


@pytest.fixture
def seen(monkeypatch):
    """The backends with which attention is computed, in order."""
    calls = []
    whole = attention_backends.attention

    def watching(*args, **kwargs):
        calls.append(args[4] if len(args) > 4 else kwargs.get("backend", DEFAULT))
        return whole(*args, **kwargs)

    for place in ("layers", "vae", "clip_layers", "t5_layers", "attention_backends"):
        monkeypatch.setattr(f"lowtide.models.{place}.attention", watching)
    return calls


@torch.no_grad()
def test_every_layer_of_the_unet(seen):
    model, inputs = tiny.unet(), tiny.unet_inputs()
    plain = model(**inputs).sample
    count = len(seen)
    assert count == len(attention_modules(model)) > 4
    for name in ("chunked", "math", "flash"):
        seen.clear()
        model.set_attention_backend(name, chunk_bytes=512)
        assert tiny.difference(model(**inputs).sample, plain) < 1e-5
        assert seen == [AttentionBackend(name, 512)] * count
    model.set_attention_backend("sdpa")
    assert torch.equal(model(**inputs).sample, plain)


@torch.no_grad()
def test_the_autoencoder(seen):
    model, z = tiny.vae(), tiny.numbers((1, 4, 6, 6), 3)
    plain = model.decode(z).sample
    model.set_attention_backend("chunked", chunk_bytes="1KiB")
    assert tiny.difference(model.decode(z).sample, plain) < 1e-5
    assert seen[-1] == AttentionBackend("chunked", 1024)
    model.enable_tiling("exact")
    assert tiny.difference(model.decode(z).sample, plain) < 1e-5, "streaming works under any backend"


@pytest.mark.parametrize("how", ["chunked", "math", "flash", "slices"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_text_encoder_of_our_own(seen, how, masked):
    model, tokens = tiny.text_encoder(), torch.arange(12).view(1, 12)
    mask = (tokens < 8).long() if masked else None
    plain = model(tokens, attention_mask=mask)[0]
    if how == "slices":
        model.enable_attention_slicing("max")
    else:
        model.set_attention_backend(how, chunk_bytes=64)
    assert tiny.difference(model(tokens, attention_mask=mask)[0], plain) < 1e-5
    assert len(seen) == 2 * len(attention_modules(model)) == 4
    model.set_attention_backend("sdpa")
    model.disable_attention_slicing()
    assert torch.equal(model(tokens, attention_mask=mask)[0], plain)


@torch.no_grad()
def test_a_text_encoder_of_transformers(seen):
    from transformers import CLIPTextConfig, CLIPTextModel

    model = tiny.set_weights(CLIPTextModel(CLIPTextConfig(**tiny.TEXT, vocab_size=518)))
    tokens = torch.arange(12).view(1, 12)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 8:] = 0
    before, config = model.config._attn_implementation, model.config.to_dict()
    plain, masked = model(tokens)[0], model(tokens, attention_mask=mask)[0]
    assert seen == []
    set_attention_backend([model], "chunked", chunk_bytes=64)
    assert tiny.difference(model(tokens)[0], plain) < 1e-5
    assert tiny.difference(model(tokens, attention_mask=mask)[0], masked) < 1e-5
    assert len(seen) == 2 * len(attention_modules(model)) == 4
    assert model.config.to_dict() == config, "a checkpoint saved now is like one saved before"
    set_attention_backend([model], "sdpa")
    assert model.config._attn_implementation == before
    seen.clear()
    assert torch.equal(model(tokens)[0], plain)
    assert seen == []


def test_models_inside_a_model_are_given_back_too():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(CLIPTextConfig(**tiny.TEXT, vocab_size=20))
    before = model.config._attn_implementation
    set_attention_backend([model], "chunked")
    assert model.config._attn_implementation != before
    set_attention_backend([model], "sdpa")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("size", "heads"), [("auto", 1), ("max", 1), (1, 1), (2, 2)])
@torch.no_grad()
def test_slices_of_heads(seen, size, heads):
    model, inputs = tiny.unet(), tiny.unet_inputs()
    plain = model(**inputs).sample
    seen.clear()
    model.enable_attention_slicing(size)
    assert tiny.difference(model(**inputs).sample, plain) < 1e-6
    assert {one.heads_at_once for one in seen} == {heads}
    model.set_attention_backend("chunked")
    assert {part.attention_backend.heads_at_once for part in attention_modules(model)} == {heads}, "both hold"
    model.set_attention_backend("sdpa")
    model.disable_attention_slicing()
    assert torch.equal(model(**inputs).sample, plain)


@pytest.mark.parametrize("size", [0, -1, 3, True, "half", 1.5])
def test_slices_that_are_not_possible_change_nothing(size):
    model = tiny.unet()
    with pytest.raises(ValueError, match=r"'auto' .*'max'.* from 1 to 2"):
        model.enable_attention_slicing(size)
    assert {part.attention_backend for part in attention_modules(model)} == {DEFAULT}


@pytest.mark.parametrize(
    ("name", "told"), [("efficient", "is not there on 'cpu'"), ("turbo", "is no attention backend")]
)
def test_a_backend_that_is_not_there_lists_those_that_are(name, told):
    unet, text = tiny.unet(), tiny.text_encoder()
    with pytest.raises(ValueError, match=f"{told}; available are sdpa, flash, chunked, math"):
        set_attention_backend([text, unet], name)
    assert {part.attention_backend for part in attention_modules(unet)} == {DEFAULT}
    with pytest.raises(ValueError, match="at least one byte"):
        unet.set_attention_backend("chunked", chunk_bytes=0)


def test_xformers_where_it_is_missing_is_one_note():
    model = tiny.unet()
    model.set_attention_backend("chunked")
    with pytest.warns(UserWarning, match="PyTorch's own memory-efficient attention") as noted:
        model.enable_xformers_memory_efficient_attention()
    assert len(noted) == 1
    assert {part.attention_backend for part in attention_modules(model)} == {DEFAULT}
    model.disable_xformers_memory_efficient_attention()


def test_xformers_where_it_is(monkeypatch):
    monkeypatch.setattr(attention_backends, "available_backends", lambda _: ("sdpa", "xformers"))
    model = tiny.unet()
    model.enable_xformers_memory_efficient_attention(attention_op="an operator")
    assert {part.attention_backend for part in attention_modules(model)} == {
        AttentionBackend("xformers", op="an operator")
    }
    model.disable_xformers_memory_efficient_attention()
    assert {part.attention_backend for part in attention_modules(model)} == {DEFAULT}


@torch.no_grad()
def test_a_pipeline_sets_all_its_networks(seen, tmp_path):
    pipe = tiny.pipeline(tmp_path)
    call = {"prompt": "sea", "num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    plain = pipe(**call, generator=tiny.seeded(1)).images
    seen.clear()
    pipe.set_attention_backend("chunked", chunk_bytes=256)
    assert tiny.difference(pipe(**call, generator=tiny.seeded(1)).images, plain) < 1e-4
    assert set(seen) == {AttentionBackend("chunked", 256)}
    layers = sum(len(attention_modules(part)) for part in (pipe.unet, pipe.vae.decoder))
    assert len(seen) == layers + 2 * len(attention_modules(pipe.text_encoder))
    pipe.enable_attention_slicing("max")
    with pytest.warns(UserWarning, match="xFormers"):
        pipe.enable_xformers_memory_efficient_attention()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.disable_attention_slicing()
    assert torch.equal(pipe(**call, generator=tiny.seeded(1)).images, plain)


def test_copies_keep_the_choice_apart():
    model = tiny.unet()
    model.set_attention_backend("chunked")
    twin = copy.deepcopy(model)
    set_attention_slicing([twin], 1)
    assert {part.attention_backend.heads_at_once for part in attention_modules(model)} == {None}
    assert {part.attention_backend.name for part in attention_modules(twin)} == {"chunked"}
