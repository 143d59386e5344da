"""Networks from GGUF files that gguf's own writer wrote: the numbers that its reader reads, left in the mapped file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny
from tests.casting.test_int4 import WIDE

from lowtide.casting.block_weight import BlockWeight
from lowtide.casting.cast_leaf import leaves
from lowtide.memory import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.models.from_gguf import model_from_gguf
from lowtide.models.put_weights import offload_named
from lowtide.models.unet import UNet2DConditionModel
from lowtide.weights.fill import WeightsMismatchError
from lowtide.weights.gguf import read_gguf_index, resting_index
from lowtide.weights.index import CheckpointError, CheckpointIndex
from lowtide.weights.names import NameTable, Rename

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType


def kind_of(name, tensor, packed):
    """As published files have it: matrices are packed, other weights half precision, vectors float32."""
    if tensor.dim() == 1:
        return KINDS.F32
    if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
        return packed
    return KINDS.BF16 if "down_blocks" in name else KINDS.F16


def write(file, model, packed, rename=lambda name: name):
    """Write a model's weights; returns what gguf's reader says that they are."""
    writer = gguf.GGUFWriter(file, "unet")
    expected = {}
    for name, tensor in model.state_dict().items():
        kind = kind_of(name, tensor, packed)
        content = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(rename(name), content, raw_dtype=kind)
        numbers = gguf.quants.dequantize(content, kind)
        expected[name] = torch.from_numpy(np.array(numbers)).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def loaded(file, **options):
    return model_from_gguf(UNet2DConditionModel, file, tiny.unet(**WIDE).config, **options)


def run(model):
    inputs = {**tiny.unet_inputs(), "encoder_hidden_states": tiny.numbers((2, 7, 32), 2)}
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize("packed", [KINDS.Q4_0, KINDS.Q8_0])
def test_the_numbers_are_those_that_gguf_reads(tmp_path, packed):
    expected = write(tmp_path / "unet.gguf", tiny.unet(**WIDE), packed)
    model = loaded(tmp_path / "unet.gguf")
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(state[name], tensor) for name, tensor in tiny.unet(**WIDE).state_dict().items())
    weights = [weight for leaf in leaves(model) for weight in leaf.weights]
    assert len(weights) > 20
    assert all(isinstance(weight, BlockWeight) and isinstance(weight.rest, DiskRest) for weight in weights)
    assert {weight.layout.name for weight in weights} == {packed.name}
    plain = tiny.unet(**WIDE)
    plain.load_state_dict(expected)
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("offload", ["block", "sequential"])
def test_under_an_offload_and_in_another_dtype(tmp_path, offload):
    write(tmp_path / "unet.gguf", tiny.unet(**WIDE), KINDS.Q4_0)
    resident = loaded(tmp_path / "unet.gguf")
    model = loaded(tmp_path / "unet.gguf", offload=offload_named(offload, "cpu"))
    assert torch.equal(run(model), run(resident))
    assert attachment_of(model).stream.ledger.moved > 0
    half = loaded(tmp_path / "unet.gguf", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(
        torch.equal(tensor, resident.state_dict()[name].bfloat16()) for name, tensor in half.state_dict().items()
    )


def test_what_was_loaded_is_saved_in_its_blocks(tmp_path):
    write(tmp_path / "unet.gguf", tiny.unet(**WIDE), KINDS.Q4_0)
    model = loaded(tmp_path / "unet.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    assert len(leaves(again)) == len(leaves(model))
    assert torch.equal(run(again), run(model))


def test_other_names(tmp_path):
    expected = write(tmp_path / "unet.gguf", tiny.unet(**WIDE), KINDS.Q4_0, rename="model.{}".format)
    table = NameTable((Rename(r"^model\.", ""),))

    def without_prefix(index):
        entries = {name.removeprefix("model."): entry for name, entry in index.items()}
        return CheckpointIndex(entries, index.files, index.metadata)

    for names in (table, without_prefix):
        state = loaded(tmp_path / "unet.gguf", names=names).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    with pytest.raises(WeightsMismatchError, match="do not match"):
        loaded(tmp_path / "unet.gguf")


def test_entries_are_those_of_a_checkpoint_of_ours(tmp_path):
    write(tmp_path / "unet.gguf", tiny.unet(**WIDE), KINDS.Q4_0)
    index = resting_index(read_gguf_index(tmp_path / "unet.gguf"))
    entry = index["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == (torch.uint8, (32, 1, 18), 32 * 18)
    entry = index["down_blocks.0.resnets.0.conv1.weight"]
    assert (entry.dtype, entry.shape) == (torch.bfloat16, (32, 32, 3, 3))


@pytest.mark.parametrize("packed", [KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1])
def test_other_kinds_are_refused_by_name(tmp_path, packed):
    write(tmp_path / "unet.gguf", tiny.unet(**WIDE), packed)
    with pytest.raises(CheckpointError, match=rf"is {packed.name}, .* Take a file of Q4_0, Q8_0, F16, BF16 or F32"):
        loaded(tmp_path / "unet.gguf")


def test_rows_of_another_model_are_told(tmp_path):
    write(tmp_path / "unet.gguf", tiny.unet(**{**WIDE, "cross_attention_dim": 64}), KINDS.Q4_0)
    with pytest.raises(
        WeightsMismatchError, match=r"attn2\.to_k\.weight: \[32, 32\] in the model, uint8 \[32, 2, 18\]"
    ):
        loaded(tmp_path / "unet.gguf")
