"""Checkpoints that the peer writes are found and read here, and ours are read by the peer."""

import pytest
import torch

from lowtide.weights.fill import load_tensors
from lowtide.weights.index import find_weights
from lowtide.weights.save import save_tensors

pytestmark = pytest.mark.parity

CASES = [(None, None), ("fp16", None), (None, 100_000), ("fp16", 100_000)]
BASE = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def vae():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)


@pytest.fixture(scope="module")
def text_encoder():
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**tiny, vocab_size=900, bos_token_id=1, eos_token_id=2)
    )


@pytest.mark.parametrize(("variant", "shard_size"), CASES)
@pytest.mark.parametrize("kind", ["vae", "text_encoder"])
def test_peer_saves_and_we_load(tmp_path, request, kind, variant, shard_size):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size or "5GB")
    index = find_weights(tmp_path, BASE if kind == "vae" else "model", variant)
    assert (len(index.files) > 1) == (shard_size is not None)
    assert same_state(load_tensors(index), model.state_dict())


@pytest.mark.parametrize(("variant", "shard_size"), CASES)
@pytest.mark.parametrize("kind", ["vae", "text_encoder"])
def test_we_save_and_peer_loads(tmp_path, request, kind, variant, shard_size):
    model = request.getfixturevalue(kind)
    model.config.save_pretrained(tmp_path) if kind == "text_encoder" else model.save_config(tmp_path)
    state = model.state_dict()
    save_tensors(state, tmp_path, BASE if kind == "vae" else "model", variant=variant, max_shard_size=shard_size)
    loaded = type(model).from_pretrained(tmp_path, variant=variant).state_dict()
    assert same_state(loaded, state)
    loaded[next(iter(loaded))].add_(1)
    assert not same_state(loaded, state)


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
