"""Saving: the published layout, ties, shards, live mappings, and saves that fail or are killed half-way."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowtide.weights.fill import load_tensors
from lowtide.weights.index import find_weights
from lowtide.weights.save import atomic_folder, save_tensors

TENSORS = {f"t{number}": torch.full((100,), float(number)) for number in range(5)}
FILES = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(folder, variant=None):
    return {name: tensor[0].item() for name, tensor in load_tensors(find_weights(folder, "model", variant)).items()}


def save_value(value, folder, **options):
    save_tensors({name: torch.full((100,), value) for name in TENSORS}, folder, "model", **options)


def test_one_file(tmp_path):
    assert save_tensors(TENSORS, tmp_path, "model") == (tmp_path / "model.safetensors",)
    assert names_in(tmp_path) == {"model.safetensors"}
    index = find_weights(tmp_path, "model")
    assert index.metadata == {"format": "pt"}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_tensors(index).items())


def test_shards_and_their_index_as_published(tmp_path):
    save_tensors(TENSORS, tmp_path, "model", max_shard_size=800)
    assert names_in(tmp_path) == {*FILES, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["t2"] == "model-00002-of-00003.safetensors"
    assert loaded(tmp_path) == {name: tensor[0].item() for name, tensor in TENSORS.items()}
    assert all(sum(t.nbytes for t in load_file(tmp_path / name).values()) <= 800 for name in FILES)


def test_size_as_text_and_variant(tmp_path):
    save_tensors(TENSORS, tmp_path, "model", variant="fp16", max_shard_size="1KB")
    assert "model.fp16-00001-of-00003.safetensors" in names_in(tmp_path)
    assert "model.safetensors.index.fp16.json" in names_in(tmp_path)
    assert loaded(tmp_path, "fp16")["t4"] == 4


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    files = save_tensors(TENSORS, tmp_path, "model", max_shard_size=1)
    assert len(files) == 6
    assert len(loaded(tmp_path)) == 5


def test_ties_are_stored_once_and_views_apart(tmp_path):
    whole = torch.arange(8.0)
    tensors = {"a": whole, "tied": whole, "half": whole[:4], "strided": whole.view(2, 4).t(), "none": torch.empty(0)}
    save_tensors(tensors, tmp_path, "model")
    read = load_tensors(find_weights(tmp_path, "model"))
    assert read.keys() == tensors.keys() - {"tied"}
    assert all(torch.equal(read[name], tensors[name]) for name in read)


def test_channels_last_weights_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    save_tensors({"a": weight}, tmp_path, "model")
    assert torch.equal(load_tensors(find_weights(tmp_path, "model"))["a"], weight)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [(torch.empty(2, device="meta"), "on meta"), (torch.ones(2, dtype=torch.complex128), "no such kind")],
)
def test_tensors_that_cannot_be_saved(tmp_path, tensor, reason):
    with pytest.raises(ValueError, match=f"'a'.*{reason}"):
        save_tensors({"a": tensor}, tmp_path, "model")
    assert names_in(tmp_path) == set()


def test_sparse_tensors_are_refused(tmp_path):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,), check_invariants=True)
    with pytest.raises(ValueError, match="no such kind"):
        save_tensors({"a": sparse}, tmp_path, "model")


@pytest.mark.parametrize("variant", ["../x", "a.b", "a/b", ""])
def test_odd_variants_are_refused(tmp_path, variant):
    with pytest.raises(ValueError, match="variant"):
        save_tensors(TENSORS, tmp_path, "model", variant=variant)


def test_files_are_readable_as_any_file_the_process_makes(tmp_path):
    (tmp_path / "plain").touch()
    (file,) = save_tensors(TENSORS, tmp_path, "model")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("through_folder", [False, True])
def test_saving_over_the_file_that_a_live_tensor_maps(tmp_path, through_folder):
    save_value(1.0, tmp_path)
    live = load_tensors(find_weights(tmp_path, "model"))
    changed = {**live, "t0": live["t0"] * 7}
    if through_folder:
        with atomic_folder(tmp_path) as new:
            save_tensors(changed, new, "model")
    else:
        save_tensors(changed, tmp_path, "model")
    assert loaded(tmp_path) == {"t0": 7, "t1": 1, "t2": 1, "t3": 1, "t4": 1}
    assert all(tensor.unique().tolist() == [1.0] for tensor in live.values())


def test_new_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_folder(target) as new:
        save_tensors(TENSORS, new / "unet", "model")
        (new / "model_index.json").write_text("{}")
        assert not target.exists()
    assert contents_of(target).keys() == {Path("unet/model.safetensors"), Path("model_index.json")}
    assert names_in(tmp_path) == {"a", "a/b", "a/b/unet", "a/b/unet/model.safetensors", "a/b/model_index.json"}


def test_other_files_are_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "notes").write_text("mine too")
    save_value(1.0, tmp_path / "unet")
    with atomic_folder(tmp_path) as new:
        save_value(2.0, new / "unet", variant="fp16")
        (new / "vae").mkdir()
        (new / "vae" / "config.json").write_text("{}")
    assert loaded(tmp_path / "unet")["t0"] == 1
    assert loaded(tmp_path / "unet", "fp16")["t0"] == 2
    assert (tmp_path / "README.md").read_text() == "mine"
    assert names_in(tmp_path) - names_in(tmp_path / "unet") >= {"README.md", "unet/notes", "vae/config.json"}
    assert not [name for name in names_in(tmp_path) if "saving" in name]


LAYOUTS = {"single": None, "three": 800, "five": 1}


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_superseded_weights_are_removed(tmp_path, before, after):
    save_value(1.0, tmp_path, max_shard_size=LAYOUTS[before])
    save_value(5.0, tmp_path, variant="fp16", max_shard_size=LAYOUTS[before])
    with atomic_folder(tmp_path) as new:
        save_value(2.0, new, max_shard_size=LAYOUTS[after])
        expected = names_in(new)
    assert set(loaded(tmp_path).values()) == {2.0}
    assert set(loaded(tmp_path, "fp16").values()) == {5.0}
    assert {name for name in names_in(tmp_path) if "fp16" not in name} == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_exception_leaves_the_target_as_it_was(tmp_path, error, exists):
    target = tmp_path / "target"
    if exists:
        save_value(1.0, target)
    before = contents_of(tmp_path)
    with pytest.raises(error), atomic_folder(target) as new:  # noqa: PT012
        save_value(2.0, new)
        raise error
    assert contents_of(tmp_path) == before
    assert target.exists() == exists


def test_failed_move_is_undone(tmp_path):
    save_value(1.0, tmp_path, max_shard_size=1)
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "zz" / "in the way").mkdir(parents=True)
    before = contents_of(tmp_path), names_in(tmp_path)
    with pytest.raises(OSError, match="in the way"), atomic_folder(tmp_path) as new:  # noqa: PT012
        save_value(2.0, new)
        (new / "config.json").write_text("new")
        (new / "aa" / "bb").mkdir(parents=True)
        (new / "aa" / "bb" / "file").touch()
        (new / "zz").mkdir()
        (new / "zz" / "in the way").touch()
    assert (contents_of(tmp_path), names_in(tmp_path)) == before


def test_entry_points_leave_first_and_arrive_last(tmp_path, monkeypatch):
    def write(folder, value):
        save_value(value, folder / "unet", max_shard_size=800)
        for name in ("model_index.json", "unet/config.json", "scheduler_config.json"):
            (folder / name).write_text(str(value))

    moves = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (moves.append((path, to)), rename(path, to))[1])
    write(tmp_path, 1.0)
    with atomic_folder(tmp_path) as new:
        write(new, 2.0)
    out = [str(path.relative_to(tmp_path)) for path, _ in moves if ".saving" not in str(path)]
    into = [str(to.relative_to(tmp_path)) for _, to in moves if ".saving" not in str(to)]
    entries = ["model_index.json", "unet/model.safetensors.index.json", "unet/config.json"]
    assert out[:3] == entries
    assert into[-3:] == entries[::-1]
    assert len(out) == len(into) == 7
    assert moves[: len(out)] == [move for move in moves if ".saving" not in str(move[0])]  # all out before any in


def test_target_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_target_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as new:
        save_value(1.0, new)
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path / "real") == {"model.safetensors"}


def test_links_in_the_target_are_replaced_and_not_written_through(tmp_path):
    save_value(1.0, tmp_path / "blobs")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    with atomic_folder(tmp_path / "target") as new:
        save_value(2.0, new)
    assert set(loaded(tmp_path / "target").values()) == {2.0}
    assert set(loaded(tmp_path / "blobs").values()) == {1.0}


KILL = """
import collections, json, os, random, shutil, signal, sys, time, torch
from pathlib import Path
from lowtide.killed_saves import complete_saves
from lowtide.weights.fill import load_tensors
from lowtide.weights.index import CheckpointError, find_weights
from lowtide.weights.save import atomic_folder, save_tensors

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")
countdown = None

def watch(event, arguments):
    global countdown
    if countdown is not None and (event in CHANGES or event == "open" and arguments[2] & os.O_ACCMODE != os.O_RDONLY):
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def write(folder, value, shard_size):
    save_tensors({f"t{i}": torch.full((100,), value) for i in range(4)}, folder, "model", max_shard_size=shard_size)
    (folder / "config.json").write_text(json.dumps({"value": value}))

def save(folder, value, shard_size):
    with atomic_folder(folder) as new:
        write(new, value, shard_size)

def careless(folder, value, shard_size):
    write(folder, value, shard_size)

def state(folder):
    try:
        complete_saves(folder)  # as every load does
        values = {json.loads((folder / "config.json").read_text())["value"]}
        tensors = load_tensors(find_weights(folder, "model"))
    except (CheckpointError, FileNotFoundError):
        return "refused"
    values |= {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), "mixed") if len(tensors) == 4 else "mixed"

def killed(saver, folder, shard_size, steps=None, seconds=None):
    global countdown
    child = os.fork()
    if not child:
        countdown = steps
        saver(folder, 2.0, shard_size)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)

def fresh(folder, shard_size):
    template = folder.with_name(f"old-{shard_size}")
    if not template.exists():
        save(template, 1.0, shard_size)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)

def at_every_step(saver, folder, before, after):
    outcomes = []
    for steps in range(10_000):
        fresh(folder, before)
        alive = not killed(saver, folder, after, steps=steps)
        outcomes.append(state(folder))
        save(folder, 2.0, after)
        assert state(folder) == "new", "a killed save stands in the way of the next one"
        assert not [name for name in os.listdir(folder) if "saving" in name], "what it left stays"
        if alive:
            return outcomes

def at_random(saver, folder, trials):
    dice, outcomes = random.Random(0), []
    for _ in range(trials):
        fresh(folder, 800)
        killed(saver, folder, 800, seconds=dice.uniform(0, 0.03))
        outcomes.append(state(folder))
    return outcomes

sys.addaudithook(watch)
os.fsync = lambda descriptor: None  # slow, and of no matter where the process is killed and not the machine
torch.set_num_threads(1)
folder = Path("x").resolve()
CASES = {
    "shards over shards": lambda: at_every_step(save, folder, 800, 800),
    "shards over one": lambda: at_every_step(save, folder, None, 800),
    "one over shards": lambda: at_every_step(save, folder, 800, None),
    "one over one": lambda: at_every_step(save, folder, None, None),
    "at random": lambda: at_random(save, folder, 30),
    "careless": lambda: at_every_step(careless, folder, 800, 800),
}
print(json.dumps({name: CASES[name]() for name in CHOSEN}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")
@pytest.mark.parametrize(
    "cases",
    [
        ["one over shards", "at random", "careless"],
        pytest.param(["shards over shards", "shards over one", "one over one"], marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_killed_save_is_old_or_new(tmp_path, cases, warm):
    """A process killed before each of its changes to the disk, and at random moments: never is nothing loaded."""
    outcomes = json.loads(warm.run(f"CHOSEN = {cases}\n{KILL}", tmp_path, 300).check())
    if "careless" in cases:
        assert "mixed" in outcomes.pop("careless")  # writing straight into the folder is caught by the same check
    for name, states in outcomes.items():
        assert set(states) <= {"old", "new"}, name
        assert states[0] == "old" or name == "at random"
    for name in outcomes.keys() - {"at random"}:
        states = outcomes[name]
        assert states[-1] == "new"
        assert states == sorted(states, key=["old", "new"].index)  # once, from old to new
        assert len(states) > 10
