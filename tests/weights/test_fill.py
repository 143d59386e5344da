"""Filling modules on meta: exact match, views of the file, conversion, ties, buffers, memory."""

import gc
import json
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.safetensors_at import save_at
from torch import nn

from lowtide.weights import files
from lowtide.weights.fill import CHUNK_BYTES, WeightsMismatchError, fill, load_tensors, state_names
from lowtide.weights.index import CheckpointError, read_index

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Small(nn.Module):
    """A parameter, a persistent integer buffer, a transient buffer, a missing bias."""

    positions: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("positions", torch.arange(5), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(6, 4)
        self.inner = nn.Sequential(nn.Embedding(6, 4))
        self.inner[0].weight = self.shared.weight
        self.same = self.inner


def on_meta(kind, *arguments):
    with torch.device("meta"):
        return kind(*arguments)


def saved(tensors, folder, name="x.safetensors"):
    save_file(tensors, folder / name)
    return read_index(folder / name)


@pytest.fixture
def small_index(tmp_path):
    torch.manual_seed(0)
    return saved(Small().state_dict(), tmp_path)


POSITIONS = {"positions": torch.arange(5)}


def test_filled_module_equals_the_saved_one(small_index):
    torch.manual_seed(0)
    original, module = Small(), on_meta(Small)
    fill(module, small_index, buffers=POSITIONS)
    for name, tensor in original.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    x = torch.ones(2, 4)
    assert torch.equal(module.eval().linear(x), original.linear(x))
    assert torch.equal(module.positions, original.positions)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert state_names(module) == set(original.state_dict())


def test_only_floating_tensors_are_converted(small_index):
    module = on_meta(Small)
    fill(module, small_index, dtype=torch.bfloat16, keep_dtype=("norm.running_*",), buffers=POSITIONS)
    assert module.linear.weight.dtype == module.norm.weight.dtype == torch.bfloat16
    buffers = dict(module.norm.named_buffers())
    assert buffers["running_var"].dtype == torch.float32
    assert buffers["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_conversion_equals_torch(tmp_path, dtype):
    tensors = {"a": torch.randn(7, 5), "scalar": torch.tensor(0.3), "none": torch.empty(0, 3)}
    read = load_tensors(saved(tensors, tmp_path), dtype=dtype)
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name].float(), tensor.to(dtype).float())
    assert not torch.equal(read["a"].double(), (tensors["a"] * 1.2).double())


def test_conversion_in_several_chunks(tmp_path):
    tensor = torch.randn(CHUNK_BYTES // 4 * 2 + 12_345)
    index = saved({"a": tensor}, tmp_path)
    assert torch.equal(load_tensors(index, dtype=torch.bfloat16)["a"], tensor.bfloat16())


@pytest.mark.parametrize("minds", [True, False])
def test_numbers_whose_place_would_change_results_are_copied(tmp_path, monkeypatch, minds):
    monkeypatch.setattr(files, "_products_mind_places", lambda: minds)
    tensors = {"wide": torch.randn(100, 30), "half": torch.randn(100, 30).half(), "whole": torch.arange(100)}
    for place in (0, 8, 16, 24):
        save_at(place, tensors, tmp_path / "x.safetensors")
        index = read_index(tmp_path / "x.safetensors")
        read = load_tensors(index)
        copied = [name for name in tensors if not _is_mapped(read[name], index.files[0])]
        offset = index["wide"].offset % 16
        assert copied == (["wide"] if minds and offset else [])
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_results_do_not_depend_on_where_a_file_begins(tmp_path):
    def product(place):
        save_at(place, {"a": matrix}, tmp_path / "x.safetensors")
        return torch.nn.functional.linear(row, load_tensors(read_index(tmp_path / "x.safetensors"))["a"])

    matrix, row = torch.randn(320, 320), torch.randn(1, 320)
    expected = torch.nn.functional.linear(row, matrix)
    assert all(torch.equal(product(place), expected) for place in range(0, 64, 8))


def test_without_copies_results_depend_on_it_where_products_do(tmp_path, monkeypatch):
    if not files._products_mind_places():
        pytest.skip("on this processor they do not")
    monkeypatch.setattr(files, "_products_mind_places", lambda: False)
    with pytest.raises(AssertionError):
        test_results_do_not_depend_on_where_a_file_begins(tmp_path)


def test_chosen_names_only(small_index):
    assert list(load_tensors(small_index, ["linear.weight"])) == ["linear.weight"]
    assert load_tensors(small_index, []) == {}


def test_matching_dtype_is_a_private_view_of_the_file(tmp_path):
    save_at(0, {"a": torch.ones(1000)}, tmp_path / "x.safetensors")
    index = read_index(tmp_path / "x.safetensors")
    before = index.files[0].read_bytes()
    tensor = load_tensors(index)["a"]
    assert _is_mapped(tensor, index.files[0])
    assert not _is_mapped(load_tensors(index, dtype=torch.float16)["a"], index.files[0])
    tensor.mul_(3)
    assert tensor.sum() == 3000
    assert index.files[0].read_bytes() == before


@linux_only
def test_the_mapping_lives_as_long_as_a_tensor(tmp_path):
    index = saved({"a": torch.ones(1000), "b": torch.ones(10)}, tmp_path)
    tensors = load_tensors(index)
    view = tensors["a"][10:]
    index.files[0].unlink()
    del tensors
    gc.collect()
    assert view.sum() == 990
    assert str(index.files[0]) in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert str(index.files[0]) not in Path("/proc/self/maps").read_text()


def test_unaligned_tensors_are_copied(tmp_path):
    values = torch.arange(4.0)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    header += b" " * (1 - len(header) % 8 + 8)
    file = tmp_path / "odd.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<4f", *values))
    index = read_index(file)
    assert index["a"].offset % 4 == 1
    read = load_tensors(index)["a"]
    assert torch.equal(read, values)
    assert read.data_ptr() % 4 == 0


def _is_mapped(tensor, file):
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    return False


@linux_only
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    size = 2**38
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = tmp_path / "sparse.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        os.truncate(file, 8 + len(header) + size)
    except OSError:
        pytest.skip("this file system has no large sparse files")
    tensor = load_tensors(read_index(file))["a"]
    assert tensor.shape == (size,)
    assert tensor[-1] == 0


def test_mismatch_lists_both_sides_at_once(tmp_path):
    state = Small().state_dict()
    state["linear.weight"] = torch.ones(4, 3)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    state["stray"] = state.pop("norm.bias")
    with pytest.raises(WeightsMismatchError) as caught:
        fill(on_meta(Small), saved(state, tmp_path), buffers=POSITIONS)
    message = str(caught.value)
    assert "In the model, not in the file (1):\n  norm.bias" in message
    assert "In the file, not in the model (1):\n  stray [3]" in message
    assert "linear.weight: [3, 4] in the model, [4, 3] in the file" in message
    assert "norm.num_batches_tracked: torch.int64 in the model, torch.float32 in the file" in message
    assert "Small" in message
    assert "x.safetensors" in message


FIRST = {
    "linear.weight": (torch.ones(4, 3), r"linear\.weight: \[3, 4\] in the model, \[4, 3\] in the file"),
    "a\nstray": (torch.ones(3), r"a stray \[3\] is not in the model"),
    "norm.bias": (None, r"norm\.bias is not in the file"),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_line_says_where_what_and_how_many_more(tmp_path, name):
    state, (tensor, said) = Small().state_dict(), FIRST[name]
    for more, count in (("", ""), ("another", r" \(and 1 more\)")):
        changed = {**state, **({more: torch.ones(1)} if more else {})}
        changed = {**changed, name: tensor} if tensor is not None else {k: v for k, v in changed.items() if k != name}
        with pytest.raises(WeightsMismatchError) as caught:
            fill(on_meta(Small), saved(changed, tmp_path), buffers=POSITIONS)
        first = str(caught.value).splitlines()[0]
        advice = r"Check that the configuration belongs to these weights\."
        assert re.fullmatch(rf"Small and its weights in .*x\.safetensors do not match: {said}{count}\. {advice}", first)


def test_long_lists_are_cut_with_their_counts(tmp_path):
    index = saved({f"k{number:03d}": torch.ones(1) for number in range(50)}, tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"(?s)\(50\):.*k019 .*and 30 more") as caught:
        fill(on_meta(nn.Linear, 2, 2), index)
    assert "k020" not in str(caught.value)


def test_failed_fill_changes_nothing(small_index, tmp_path):
    module = on_meta(Small)
    with pytest.raises(ValueError, match=r"On meta and not given: \['positions'\]"):
        fill(module, small_index)
    os.truncate(small_index.files[0], small_index.files[0].stat().st_size - 8)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(CheckpointError, match="become shorter"):
            fill(module, small_index, dtype=dtype, buffers=POSITIONS)
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_transient_buffers_are_checked(small_index):
    with pytest.raises(ValueError, match=r"given but not there: \['linear.weight'\]"):
        fill(on_meta(Small), small_index, buffers={**POSITIONS, "linear.weight": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r"of another shape: \['positions'\]"):
        fill(on_meta(Small), small_index, buffers={"positions": torch.arange(4)})


def test_transient_buffers_not_on_meta_may_stay(small_index):
    module = on_meta(Small)
    module.positions = torch.arange(5)
    fill(module, small_index)
    assert module.positions.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["shared.weight", "inner.0.weight", "same.0.weight"])
def test_tied_parameter_needs_one_name_and_stays_one(tmp_path, name):
    weight = torch.randn(6, 4)
    module = on_meta(Tied)
    fill(module, saved({name: weight}, tmp_path))
    assert module.shared.weight is module.inner[0].weight is module.same[0].weight
    assert torch.equal(module.shared.weight, weight)


def test_tied_parameter_under_two_names_must_agree(tmp_path):
    weight = torch.randn(6, 4)
    fill(on_meta(Tied), saved({"shared.weight": weight, "inner.0.weight": weight.clone()}, tmp_path))
    other = saved({"shared.weight": weight, "inner.0.weight": weight + 1}, tmp_path, "y.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"shared.weight = inner.0.weight: one tied tensor"):
        fill(on_meta(Tied), other)


def test_missing_tied_parameter_is_named_by_all_its_names(tmp_path):
    with pytest.raises(WeightsMismatchError, match=r"shared.weight = inner.0.weight = same.0.weight"):
        fill(on_meta(Tied), saved({"a": torch.ones(1)}, tmp_path))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_filling_on_an_accelerator(small_index, dtype, device):
    module, resident = on_meta(Small), on_meta(Small)
    fill(module, small_index, dtype=dtype, device=device, buffers=POSITIONS)
    fill(resident, small_index, dtype=dtype, buffers=POSITIONS)
    assert all(tensor.device == device for tensor in [*module.parameters(), *module.buffers()])
    for name, tensor in resident.state_dict().items():
        assert torch.equal(module.state_dict()[name].cpu(), tensor)


MEASURE = """
import ctypes, json, torch
from pathlib import Path
from safetensors.torch import load_file
from torch import nn
from lowtide.weights.fill import fill
from lowtide.weights.index import read_index

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def grown(act):
    Path("/proc/self/clear_refs").write_text("5")
    anonymous, resident = status("RssAnon"), status("VmRSS")
    kept = act()
    return {"anonymous": status("RssAnon") - anonymous, "peak": status("VmHWM") - resident}

def filled(dtype):
    with torch.device("meta"):
        module = nn.Sequential(*[nn.Linear(2560, 1024, bias=False) for _ in range(6)])
    fill(module, read_index(file), dtype=dtype)
    for parameter in module.parameters():
        parameter.sum()
    return module

def naive():
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}

libc = ctypes.CDLL(None)
libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: what is freed goes back at once, so cases stay apart
libc.mallopt(-1, 2**20)
file = Path(sys.argv[1])
torch.set_num_threads(1)
torch.ones(1024, 2560).to(torch.bfloat16).sum()
print(json.dumps({
    "mapped": grown(lambda: filled(torch.float32)),
    "converted": grown(lambda: filled(torch.bfloat16)),
    "cloned": grown(lambda: {name: tensor.clone() for name, tensor in load_file(file).items()}),
    "naive": grown(naive),
}))
"""


@linux_only
def test_memory_of_filling(tmp_path, warm):
    """63 MB of float32: nothing anonymous where the dtype matches, the new weights and one chunk where it does not."""
    weights, tensor_bytes = 6, 1024 * 2560 * 4
    file = tmp_path / "x.safetensors"
    save_at(0, {f"{number}.weight": torch.full((1024, 2560), 0.5) for number in range(weights)}, file)
    grown = json.loads(warm.run(MEASURE.replace("sys.argv[1]", repr(str(file))), tmp_path, 300).check())
    new, slack = weights * tensor_bytes // 2, 8 * 2**20
    assert grown["mapped"]["anonymous"] < slack
    assert grown["converted"]["peak"] <= new + CHUNK_BYTES + slack <= new + tensor_bytes + 2 * slack
    assert grown["cloned"]["anonymous"] > 0.99 * weights * tensor_bytes  # the control: a copy is seen
    assert grown["naive"]["peak"] > new + tensor_bytes + 2 * slack
