"""The video transformer loaded from files under every plan and cast: the plain run's results, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests import tiny
from tests.memory.cases import RULES, put
from tests.thinned import covering

from lowtide.casting.apply_casting import apply_casting, named_casting
from lowtide.casting.casting import Casting
from lowtide.memory import attachment_of
from lowtide.models import video_layers
from lowtide.models.video_transformer import CogVideoXTransformer3DModel

KINDS = list(tiny.TRANSFORMERS)
OFFLOADS = [None, "model", "block", "leaf", "sequential"]
CASTINGS = {None: None, "fp8": "fp8", "int8": "int8", "plain fp8": Casting("float8_e4m3fn")}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    """Several groups of tokens in the feed-forwards, as real videos have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_layers, "GROUP", 16)
        patch.setattr("lowtide.models.video_transformer.GROUP", 16)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp("models") / "transformer" for kind in KINDS}
    for kind, folder in made.items():
        tiny.video_transformer(kind).save_pretrained(folder, max_shard_size="60KB")
    return made


def inputs_of(kind, dtype):
    return {
        name: value.to(dtype) if name.endswith("hidden_states") else value
        for name, value in tiny.video_inputs(kind).items()
    }


@torch.no_grad()
def run(model, kind, dtype):
    return model(**inputs_of(kind, dtype)).sample


@pytest.mark.parametrize(("kind", "casting", "dtype"), covering(KINDS, CASTINGS, DTYPES))
def test_loaded_under_every_plan(folders, kind, casting, dtype):
    whole = tiny.video_transformer(kind).to(dtype)
    plain = run(whole, kind, dtype)
    asked = CASTINGS[casting]
    rule = named_casting(asked)
    if rule is not None:
        apply_casting(whole, Casting(rule.storage, scaled=rule.scaled, compute=str(dtype).removeprefix("torch.")))
    expected = run(whole, kind, dtype)
    assert torch.equal(expected, plain) == (casting is None)  # a control: a cast changes what comes out
    for offload in OFFLOADS:
        model = CogVideoXTransformer3DModel.from_pretrained(
            folders[kind], dtype=dtype, offload=offload, offload_device="cpu", casting=asked
        )
        for _ in range(2):
            assert torch.equal(run(model, kind, dtype), expected), offload
        assert (attachment_of(model) is None) == (offload is None)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(["sequential", "blocks ahead", "model"], 2)))
def test_plans_casts_and_back_in_any_order(first, second):
    model = tiny.video_transformer()
    plain = run(model, "5b", torch.float32)
    put(model, RULES[first])
    model.enable_layerwise_casting(torch.float8_e4m3fn, scaled=True)
    cast = run(model, "5b", torch.float32)
    assert not torch.equal(cast, plain)
    put(model, RULES[second], zero_copy=False)
    assert torch.equal(run(model, "5b", torch.float32), cast)
    model.disable_forward_chunking()
    assert torch.equal(run(model, "5b", torch.float32), cast)
    model.disable_group_offload()
    assert torch.equal(run(model, "5b", torch.float32), cast)


@pytest.mark.parametrize("pattern", [None, "auto", (), "^time_embedding"])
def test_patches_and_norms_are_never_cast(pattern):
    model = tiny.video_transformer()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=pattern)
    numbers = {
        name.removesuffix(".weight") for name, one in model.named_parameters() if type(one) is torch.nn.Parameter
    }
    cast = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith("weight")} - numbers
    assert not [name for name in cast if "norm" in name or "patch_embed" in name]
    assert "transformer_blocks.1.attn1.to_q" in cast
    assert "transformer_blocks.1.ff.net.0.proj" in cast
    assert ("time_embedding.linear_1" in cast) == (pattern != "^time_embedding")
    assert ("proj_out" in cast) == (pattern not in (None, "auto"))


def test_group_offload_by_pairs_of_blocks():
    model = tiny.video_transformer("1.5")
    expected = run(model, "1.5", torch.float32)
    model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=2, use_stream=True)
    assert torch.equal(run(model, "1.5", torch.float32), expected)
    attachment = attachment_of(model)
    assert attachment is not None
    groups = [unit for unit in attachment.units if len(unit.modules) == 2]
    assert [module for unit in groups for module in unit.modules] == list(model.transformer_blocks)[:2]
    model.disable_group_offload()
    assert torch.equal(run(model, "1.5", torch.float32), expected)
