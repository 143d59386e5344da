"""Reading headers and finding published file names."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowtide.weights.fill import load_tensors
from lowtide.weights.index import (
    DTYPES,
    CheckpointError,
    UnsafeWeightsError,
    WeightsName,
    find_weights,
    parse_weights_name,
    read_index,
)
from lowtide.weights.save import save_tensors

BASE = "diffusion_pytorch_model"


def tensor_of(dtype, shape, seed):
    count = torch.Size(shape).numel()
    dice = torch.Generator().manual_seed(seed)
    limit = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, limit, (count * dtype.itemsize,), dtype=torch.uint8, generator=dice)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def write(folder, name, value=1.0, key="a"):
    save_file({key: torch.full((3,), value)}, folder / name)


def write_shards(folder, shards, index_name):
    """Shards of one tensor each, named as asked, with their index."""
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        write(folder, shard, float(number), key=f"t{number}")
    weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
    (folder / index_name).write_text(
        json.dumps({"metadata": {"total_size": 12 * len(shards)}, "weight_map": weight_map})
    )


def test_entries_are_byte_ranges_of_the_file(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5), "none": torch.empty(0, 4)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    index = read_index(file)
    content = file.read_bytes()
    for name, tensor in tensors.items():
        entry = index[name]
        assert (entry.dtype, entry.shape, entry.file) == (tensor.dtype, tuple(tensor.shape), file)
        assert content[entry.offset : entry.offset + entry.nbytes] == bytes(bytes_of(tensor).tolist())
    assert index.total_bytes == 24 + 40
    assert index.metadata == {"format": "pt"}
    assert index.files == (file,)
    assert set(index) == set(tensors)


def test_relative_folder_survives_a_change_of_directory(tmp_path, monkeypatch):
    write(tmp_path, "model.safetensors")
    monkeypatch.chdir(tmp_path)
    index = find_weights(type(tmp_path)("."), "model")
    monkeypatch.chdir("/")
    assert load_tensors(index)["a"].tolist() == [1, 1, 1]


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"])  # load_file lacks it
contents = st.dictionaries(names, st.tuples(dtypes, shapes, st.integers(0, 99)), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents)
def test_round_trip_with_the_safetensors_library(tmp_path, content):
    tensors = {name: tensor_of(*kind) for name, kind in content.items()}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    save_tensors(tensors, tmp_path, "ours")
    for read in (load_tensors(read_index(theirs)), load_tensors(read_index(ours)), load_file(ours)):
        assert read.keys() == tensors.keys()
        assert all(same_bytes(read[name], tensors[name]) for name in tensors)


def test_every_dtype_of_the_table_round_trips(tmp_path):
    tensors = {name: tensor_of(dtype, (2, 3), 0) for name, dtype in DTYPES.items()}
    save_tensors(tensors, tmp_path, "model")
    read = load_tensors(find_weights(tmp_path, "model"))
    assert all(same_bytes(read[name], tensors[name]) for name in tensors)
    assert not same_bytes(read["F32"], tensors["F32"].roll(1, 1))  # the comparison sees a change


PUBLISHED = {
    "diffusion_pytorch_model.safetensors": (BASE, None, "single"),
    "diffusion_pytorch_model.fp16.safetensors": (BASE, "fp16", "single"),
    "model.non_ema.safetensors": ("model", "non_ema", "single"),
    "model-00001-of-00002.safetensors": ("model", None, "shard"),
    "model.fp16-00001-of-00002.safetensors": ("model", "fp16", "shard"),
    "model-00001-of-00002.fp16.safetensors": ("model", "fp16", "shard"),
    "model.safetensors.index.json": ("model", None, "index"),
    "model.safetensors.index.fp16.json": ("model", "fp16", "index"),
    "model.safetensors.fp16.index.json": ("model", "fp16", "index"),
    "model.fp16.safetensors.index.json": ("model", "fp16", "index"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_understood(name):
    assert parse_weights_name(name) == WeightsName(*PUBLISHED[name])


@pytest.mark.parametrize("name", ["config.json", "model.bin", ".model.safetensors.partial", "model_index.json"])
def test_other_names_are_not_weights(name):
    assert parse_weights_name(name) is None


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_single_file_is_found_by_variant(tmp_path, variant):
    write(tmp_path, "model.safetensors", 1.0)
    write(tmp_path, "model.fp16.safetensors", 2.0)
    write(tmp_path, "other.safetensors", 3.0)
    expected = 1.0 if variant is None else 2.0
    assert load_tensors(find_weights(tmp_path, "model", variant))["a"][0] == expected


@pytest.mark.parametrize(
    ("variant", "shards", "index_name"),
    [
        (None, "model-0000{}-of-00002.safetensors", "model.safetensors.index.json"),
        ("fp16", "model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        ("fp16", "model-0000{}-of-00002.fp16.safetensors", "model.safetensors.fp16.index.json"),
        ("fp16", "model.fp16-0000{}-of-00002.safetensors", "model.fp16.safetensors.index.json"),
    ],
)
def test_shards_are_found_in_every_published_spelling(tmp_path, variant, shards, index_name):
    write_shards(tmp_path, [shards.format(1), shards.format(2)], index_name)
    index = find_weights(tmp_path, "model", variant)
    assert {name: tensor[0].item() for name, tensor in load_tensors(index).items()} == {"t0": 0.0, "t1": 1.0}
    assert len(index.files) == 2
    assert index.total_bytes == 24


def test_missing_variant_lists_those_there_are(tmp_path):
    write(tmp_path, "model.safetensors")
    write(tmp_path, "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"variant 'bf16'.*variant=None, variant='fp16'"):
        find_weights(tmp_path, "model", "bf16")


def test_default_is_not_taken_from_a_variant(tmp_path):
    write(tmp_path, "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match="variant='fp16'"):
        find_weights(tmp_path, "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "v1-5.ckpt", "model.pt", "model.pth"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsafeWeightsError, match=r"pickled.*" + name):
        find_weights(tmp_path, "model")


def test_no_weights_lists_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no 'model' weights.*config\.json"):
        find_weights(tmp_path, "model")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_weights(tmp_path / "nowhere", "model")
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "nowhere.safetensors")


def test_shards_without_their_index(tmp_path):
    write(tmp_path, "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="not their index"):
        find_weights(tmp_path, "model")


def test_single_file_beside_shards_is_ambiguous(tmp_path):
    write_shards(tmp_path, ["model-00001-of-00001.safetensors"], "model.safetensors.index.json")
    write(tmp_path, "model.safetensors")
    with pytest.raises(CheckpointError, match="both"):
        find_weights(tmp_path, "model")


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_shards(blobs, shards, "model.safetensors.index.json")
    for number, blob in enumerate(list(blobs.iterdir())):
        hashed = blobs / f"hash{number}"
        shutil.move(blob, hashed)
        (snapshot / blob.name).symlink_to(os.path.relpath(hashed, snapshot))
    assert set(find_weights(snapshot, "model")) == {"t0", "t1"}
